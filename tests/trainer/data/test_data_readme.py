"""The data README: its worked example runs as written, and its tables name what there is."""

import doctest
import inspect
import re
from pathlib import Path

import pytest
from PIL import Image

from safevlm.trainer import data
from safevlm.trainer.data import ReadOptions, SafetyRow, formats, iter_rows
from safevlm.trainer.data.taxonomy import TAXONOMY_KEYS

README = (Path(inspect.getfile(data)).parent / "README.md").read_text(encoding="utf-8")


def table(title):
    """The first cells of the table under a heading, without backticks."""
    section = README.split(f"\n{title}\n", 1)[1]
    rows = re.search(r"\n\|---.*?\n(.*?)\n\n", section, re.DOTALL)[1]
    return [re.findall(r"`([^`]+)`", row.split("|")[1]) for row in rows.splitlines()]


def test_worked_example_runs_as_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, content in re.findall(r"<!-- file: (\S+) -->\n```\w+\n(.*?)```", README, re.DOTALL):
        (tmp_path / name).write_text(content, encoding="utf-8")
    for name in ("one.png", "two.png"):
        Image.new("RGB", (4, 4)).save(tmp_path / name)
    example = doctest.DocTestParser().get_doctest(README, {}, "README.md", None, 0)
    assert len(example.examples) == 4
    report = []
    assert doctest.DocTestRunner(verbose=False).run(example, out=report.append).failed == 0, "".join(report)


def test_table_of_formats_is_complete():
    assert {name for names in table("## Formats") for name in names} == set(formats.known_formats())


def test_table_of_row_fields_is_complete():
    assert {name for names in table("## A row") for name in names} == set(SafetyRow.__dataclass_fields__)


def test_table_of_taxonomy_keys_is_complete():
    section = README[README.index("| key | meaning |") :]
    rows = section.split("\n\n")[0].splitlines()[2:]
    named = {name for row in rows for name in re.findall(r"`(\w+)`", row.split("|")[1])}
    assert named == set(TAXONOMY_KEYS)


@pytest.mark.parametrize("option", re.findall(r"(\w+)=", README.split("## Reading")[1].split("```")[1]))
def test_options_in_the_examples_exist(option):
    assert option in {*inspect.signature(iter_rows).parameters, *ReadOptions.__dataclass_fields__}
