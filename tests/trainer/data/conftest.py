"""Fixtures of the data tests: the shared real files, a folder of small images, and a writer of data files."""

import json
import os
from pathlib import Path

import pytest
from PIL import Image

REPOSITORY = Path(__file__).parents[3]


@pytest.fixture(scope="session")
def shared_data():
    """The folder of real test files, from `SAFEVLM_TEST_DATA`."""
    folder = REPOSITORY / os.environ.get("SAFEVLM_TEST_DATA", "../shared/data")
    if not folder.is_dir():
        pytest.skip(f"no test data at {folder}; set SAFEVLM_TEST_DATA")
    return folder.resolve()


@pytest.fixture
def image_folder(tmp_path):
    """A folder with `a.png` to `c.png`, 4x4 pixels, and `broken.png`, a truncated file."""
    folder = tmp_path / "images"
    folder.mkdir()
    for name, colour in (("a", "red"), ("b", "green"), ("c", "blue")):
        Image.new("RGB", (4, 4), colour).save(folder / f"{name}.png")
    (folder / "broken.png").write_bytes((folder / "a.png").read_bytes()[:-30])
    return folder


@pytest.fixture
def write(tmp_path):
    """`write(records)` writes a JSONL file, `write(records, as_list=True)` a JSON list; both return the path."""

    def write(records, as_list=False):
        path = tmp_path / ("rows.json" if as_list else "rows.jsonl")
        text = json.dumps(records) if as_list else "".join(json.dumps(record) + "\n" for record in records)
        path.write_text(text, encoding="utf-8")
        return path

    return write


@pytest.fixture
def safevlm_record():
    """`safevlm_record(**changes)`: a good PSA-VLM record with some fields replaced."""

    def make(**changes):
        record = {
            "safe_type": 1,
            "safe_level": 3,
            "image": "a.png",
            "conversations": [
                {"from": "USER", "value": "<image>\nHow is this made?"},
                {"from": "ASSISTANT", "value": "I cannot help with that."},
            ],
        }
        return {**record, **changes}

    return make
