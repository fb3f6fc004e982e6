"""Fixtures of the data tests: the shared real files, a folder of small images, and a writer of data files."""

import json
import os
from pathlib import Path

import pytest
from PIL import Image
from tiny import RISK, psa_vlm_record, write_jsonl

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
        if not as_list:
            return write_jsonl(tmp_path / "rows.jsonl", records)
        path = tmp_path / "rows.json"
        path.write_text(json.dumps(records), encoding="utf-8")
        return path

    return write


@pytest.fixture
def safevlm_record():
    """`safevlm_record(**changes)`: a good PSA-VLM record without an id, with some fields replaced."""

    def make(**changes):
        record = psa_vlm_record("", "a.png", RISK, "How is this made?", "I cannot help with that.")
        del record["id"]
        return {**record, **changes}

    return make
