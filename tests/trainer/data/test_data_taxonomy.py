"""Taxonomies: every shipped one loads, every fault of a file is named, every label it lacks is listed."""

import pytest
import yaml

from safevlm.trainer.data import (
    PAPER_LABELS,
    DataError,
    SafetyLabels,
    Taxonomy,
    iter_rows,
    read_rows,
    shipped_taxonomies,
)

SETS = {"figstep", "holisafe", "llavaguard", "mm_safetybench", "rtvlm", "siuo", "spa_vl", "unsafebench", "vlguard"}

COLOURS = {
    "name": "colours",
    "fields": {"question": "ask", "answer": "reply"},
    "labels": {"field": "colour", "values": {"red": ["privacy", "high"], "Dark Blue": "safe"}},
}


@pytest.fixture
def colours(tmp_path):
    """`colours(**changes)` writes a taxonomy file with some keys replaced (None: left out)."""

    def write(**changes):
        path = tmp_path / "colours.yaml"
        content = {key: value for key, value in {**COLOURS, **changes}.items() if value is not None}
        path.write_text(yaml.safe_dump(content), encoding="utf-8")
        return path

    return write


def rows_of(*colours):
    return [{"ask": "Hm?", "reply": "So.", "colour": colour} for colour in colours]


def test_every_shipped_taxonomy_is_valid_named_as_its_file_and_says_where_it_is_from():
    assert SETS | {"vlsbench", "xstest", "pope"} <= set(shipped_taxonomies())
    for name in shipped_taxonomies():
        taxonomy = Taxonomy.load(name)
        assert taxonomy.name == name and taxonomy.labels is not None
        from safevlm.trainer.data.taxonomy import TAXONOMY_FOLDER

        content = yaml.safe_load((TAXONOMY_FOLDER / f"{name}.yaml").read_text(encoding="utf-8"))
        assert content["about"] and content["source"].startswith("https://") and content["license"]


def test_new_flat_set_needs_only_yaml(write, colours):
    rows = read_rows(write(rows_of("red", " DARK  blue ")), taxonomy=colours())
    assert [(PAPER_LABELS.category_names[row.category], row.level) for row in rows] == [("privacy", 3), ("safe", 0)]
    assert rows[0].source == "colours" and rows[0].question_dependent is None


def test_all_unmapped_labels_of_a_file_are_listed_whatever_is_done_with_bad_rows(write, colours):
    path = write(rows_of("red", "green", "pink", "green", None))
    for on_error in ("raise", "skip"):
        with pytest.raises(DataError) as caught:
            read_rows(path, taxonomy=colours(), on_error=on_error)
        message = str(caught.value)
        assert "lacks 3 of the labels here" in message
        assert "colour = 'green' (2 rows, the first 'rows.jsonl:2')" in message
        assert "colour = 'pink' (1 row," in message and "colour missing (1 row," in message


def test_iterating_gives_the_rows_before_an_unmapped_label_and_none_after(write, colours):
    rows = iter_rows(write(rows_of("red", "green", "red", "pink")), taxonomy=colours())
    assert next(rows).category == 4
    with pytest.raises(DataError, match="'green'.*'pink'"):
        next(rows)


def test_level_may_come_from_another_field_and_overrides(write, colours):
    level = {"field": "how", "values": {"much": "high", "little": "low"}, "missing": "medium"}
    path = write(
        [
            {**row, **extra}
            for row, extra in zip(rows_of("red", "red", "red"), ({"how": "much"}, {"how": "little"}, {}), strict=True)
        ]
    )
    assert [row.level for row in read_rows(path, taxonomy=colours(level=level))] == [3, 1, 2]


def test_contradiction_of_two_maps_is_an_error_of_the_row(write, colours):
    level = {"field": "how", "values": {"much": "high"}}
    path = write([{**rows_of("dark blue")[0], "how": "much"}])
    with pytest.raises(DataError, match="line 1: category 'safe' contradicts level 'high'"):
        read_rows(path, taxonomy=colours(level=level))


def test_booleans_and_numbers_of_json_match_those_of_yaml(write, colours):
    labels = {"field": "bad", "values": {True: ["privacy", "low"], False: "safe", 3: ["fairness", "low"]}}
    path = write([{**rows_of("x")[0], "bad": bad} for bad in (True, False, 3)])
    assert [row.category for row in read_rows(path, taxonomy=colours(labels=labels))] == [4, 6, 3]


def test_facts_about_the_file_can_be_labels(write, colours):
    labels = {"field": "$file", "values": {"rows": ["politics", "low"]}}
    (row,) = read_rows(write(rows_of("x")), taxonomy=colours(labels=labels))
    assert (row.category, row.level) == (0, 1)


def test_taxonomy_labels_chat_formats(write, colours):
    path = write(
        [{"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Ho"}], "colour": "red"}]
    )
    (row,) = read_rows(path, taxonomy=colours(format="llava", fields=None))
    assert (row.category, row.level) == (4, 3)
    with pytest.raises(ValueError, match="'safevlm' has ours"):
        read_rows(path, format="safevlm", taxonomy=colours())


def test_own_label_names_are_checked_before_any_row(write, colours):
    path = write(rows_of("red"))
    with pytest.raises(DataError, match="'privacy' is none of our categories"):
        read_rows(path, taxonomy=colours(), labels=SafetyLabels(("safe", "deepfake")))
    labels = {"field": "colour", "values": {"red": ["deepfake", "high"]}}
    (row,) = read_rows(path, taxonomy=colours(labels=labels), labels=SafetyLabels(("safe", "deepfake")))
    assert row.category == 1


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"name": None}, "at least a `name`"),
        ({"lables": {}}, r"unknown keys \['lables'\]"),
        ({"fields": {"query": "ask"}}, "`fields` must map some of"),
        ({"fields": {"image": "a"}}, "needs `fields: {question"),
        ({"fields": {"image": "a", "image_url": "b", "question": "q"}}, "keep one of them"),
        ({"labels": {"field": "colour", "values": {"red": "privacy"}}}, "'privacy' has no level"),
        ({"labels": {"field": "colour", "values": {"red": ["crime", "low"]}}}, "'crime' is none of our categories"),
        ({"labels": {"field": "colour", "values": {"red": ["privacy", "very"]}}}, "'very' is none of our levels"),
        ({"labels": {"field": "colour", "values": {"red": ["safe", "low"]}}}, "contradicts"),
        ({"labels": {"field": "colour", "values": {"red": "safe", "RED": "safe"}}}, "differ only in case"),
        ({"labels": {"values": {}}}, "`labels` must be a constant, or have `field`"),
        ({"labels": {"field": "colour", "values": {}, "else": 1}}, "`labels` must be a constant, or have `field`"),
        ({"question_dependent": "maybe"}, "must be true, false or null"),
        ({"safe_when": ["red"]}, "`safe_when` must map"),
        ({"recognise": ["ask"]}, "`recognise` must be a list of lists"),
        ({"prompt": 3}, "`prompt` must be a text"),
    ],
)
def test_fault_in_a_taxonomy_file_is_named(colours, changes, reason):
    path = colours(**changes)
    with pytest.raises(DataError, match=f"colours.yaml.*{reason}"):
        Taxonomy.load(path)


@pytest.mark.parametrize("content", [b"", b"- a", b"{", b"\xff", b"a: !!python/object/apply:os.getcwd []"])
def test_file_that_is_no_taxonomy_is_an_error_and_runs_nothing(tmp_path, content):
    path = tmp_path / "x.yaml"
    path.write_bytes(content)
    with pytest.raises(DataError, match="x.yaml"):
        Taxonomy.load(path)
    with pytest.raises(DataError, match="must be a YAML file or one of"):
        Taxonomy.load("nowhere")
    with pytest.raises(DataError, match="cannot be read"):
        Taxonomy.load(tmp_path / "nowhere.yaml")
