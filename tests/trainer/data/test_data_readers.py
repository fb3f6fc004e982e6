"""Readers: real files, each kind of bad row, hostile paths, and any JSON at all."""

import json
import logging
import os

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from safevlm.trainer.data import (
    DataError,
    ImageError,
    ReadOptions,
    RowFormat,
    Rows,
    SafetyLabels,
    SafetyRow,
    detect_format,
    formats,
    read_llava_json,
    read_rows,
    read_safevlm_jsonl,
    register_format,
    write_safevlm_jsonl,
)

IMAGE = {"type": "image"}


def text(value):
    return {"type": "text", "text": value}


def dialogue(*values):
    return [{"from": ("human", "gpt")[number % 2], "value": value} for number, value in enumerate(values)]


# --- real files


def test_qwen_demo_reads_with_its_images(shared_data):
    folder = shared_data / "qwen_finetune_demo/qwen-vl-finetune"
    rows = read_rows(folder / "demo/single_images.json", folder)
    assert [row.row_id for row in rows] == [f"single_images.json:{number}" for number in (1, 2, 3)]
    assert rows[0].images == (folder / "demo/images/10095.png",)
    assert rows[0].messages == [
        {"role": "user", "content": [text("Is the value of Favorable 38 in 2015?"), IMAGE]},
        {"role": "assistant", "content": [text("Yes")]},
    ]
    assert (rows[0].category, rows[0].level, rows[0].source) == (None, None, "single_images")
    assert rows[0].load_images()[0].mode == "RGB" and rows.skipped == []


@pytest.mark.parametrize(
    ("name", "images_per_row", "turns_per_row"),
    [
        ("single_image", [1, 1], [5, 2]),
        ("multi_images", [2, 4], [3, 3]),
        ("single_image_has_text_only", [1, 1, 0, 0], [5, 2, 2, 2]),
    ],
)
def test_lmms_finetune_examples_read(shared_data, name, images_per_row, turns_per_row):
    path = shared_data / f"lmms_finetune_json/example_data/{name}.json"
    rows = read_rows(path, check_images="none")  # the repository ships no pictures
    assert [len(row.images) for row in rows] == images_per_row
    assert [len(row.messages) for row in rows] == turns_per_row
    assert rows[0].messages[0]["role"] == "system"
    with pytest.raises(ImageError, match="does not exist"):
        read_rows(path)


def test_missing_pictures_are_skipped_and_counted(shared_data, caplog):
    path = shared_data / "lmms_finetune_json/example_data/single_image_has_text_only.json"
    with caplog.at_level(logging.WARNING):
        rows = read_llava_json(path, on_error="skip")
    assert len(rows) == 2 and [row_id for row_id, _ in rows.skipped] == [f"{path.name}:1", f"{path.name}:2"]
    assert "bm.jpg' does not exist" in rows.skipped[0][1]
    assert "skipped 2 of 4 rows" in caplog.text


# --- the PSA-VLM format


def test_reference_style_rows_read(write, image_folder, safevlm_record):
    marker_last = [{"from": "USER", "value": "Who is it?\n<image>"}, {"from": "ASSISTANT", "value": "Ted"}]
    path = write(
        [
            safevlm_record(),
            safevlm_record(safe_type=5, safe_level=0, image="a.png<split>b.png", conversations=marker_last),
            safevlm_record(safe_type="safe", safe_level="none", image=str(image_folder / "c.png"), id=17),
        ]
    )
    first, pair, safe = read_safevlm_jsonl(path, image_folder)
    assert (first.row_id, first.category, first.level, first.source) == ("rows.jsonl:1", 1, 3, "rows")
    assert first.messages[0]["content"] == [IMAGE, text("How is this made?")]
    # one marker stands for both images, in its place
    assert pair.messages[0]["content"] == [text("Who is it?"), IMAGE, IMAGE]
    assert pair.images == (image_folder / "a.png", image_folder / "b.png")
    assert (safe.row_id, safe.category, safe.level, safe.images) == ("17", 6, 0, (image_folder / "c.png",))


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"safe_type": 7}, "`safe_type`: unknown category 7"),
        ({"safe_level": -1}, "unknown level -1"),
        ({"safe_type": "6"}, "unknown category '6'"),
        ({"safe_type": True}, "unknown category True"),
        ({"safe_type": 6, "safe_level": 2}, "contradicts"),
        ({"conversations": []}, "non-empty list of turns"),
        ({"conversations": None}, "non-empty list of turns"),
        ({"conversations": ["Hi"]}, "'from' and 'value'"),
        ({"conversations": [{"from": "robot", "value": "Hi"}]}, "`from` must be one of"),
        ({"conversations": dialogue("<image>", 5)}, "turn 2, `value`: text must be a string"),
        (
            {"conversations": dialogue("<image>Hi"), "safe_type": None, "safe_level": None},
            "neither an answer nor a label",
        ),
        ({"conversations": dialogue("<image>Hi", "")}, "empty"),
        ({"conversations": dialogue("", "Yes"), "image": None}, "empty"),
        ({"conversations": dialogue("<image>Hi", "Yes")[::-1]}, "expected 'user'"),
        ({"conversations": dialogue("<image>Hi", "\ud800")}, "not valid Unicode"),
        ({"conversations": dialogue("<image><image>Hi", "Yes")}, "1 in `image` but 2 <image>"),
        ({"image": None}, "0 in `image` but 1 <image>"),
        ({"image": 5}, "`image` must be a path"),
        ({"image": ""}, "`image` must be a path"),
        ({"image": ["a.png", None]}, "`image` must be a path"),
        ({"image": "a.png\0"}, "NUL"),
        ({"image": "nowhere.png"}, "'rows.jsonl:1'.*does not exist"),
        ({"image": "broken.png"}, "broken.png' is truncated or corrupt"),
        ({"image": "a.png<split>broken.png"}, "broken.png' is truncated or corrupt"),
        ({"id": [1]}, "`id` must be"),
    ],
)
def test_bad_row_raises_with_its_place_or_is_skipped_with_its_reason(
    write, image_folder, safevlm_record, changes, reason
):
    path = write([safevlm_record(**changes), safevlm_record()])
    with pytest.raises(DataError, match=reason) as caught:
        read_safevlm_jsonl(path, image_folder)
    assert f"{path}, line 1: " in str(caught.value)
    rows = read_safevlm_jsonl(path, image_folder, on_error="skip")
    assert len(rows) == 1 and rows.skipped == [("rows.jsonl:1", str(caught.value))]


@pytest.mark.parametrize("field", ["safe_type", "safe_level"])
def test_row_that_lost_a_label_is_an_error(write, image_folder, safevlm_record, field):
    record = safevlm_record()
    del record[field]
    with pytest.raises(DataError, match=f"`{field}` is missing"):
        read_rows(write([safevlm_record(), record]), image_folder)


def test_own_label_names_set_the_meaning_of_the_indices(write, image_folder, safevlm_record):
    path = write([safevlm_record(safe_type=1, safe_level="yes"), safevlm_record(safe_type="safe", safe_level=0)])
    rows = read_rows(path, image_folder, labels=SafetyLabels(("safe", "deepfake"), ("no", "yes")))
    assert [(row.category, row.level) for row in rows] == [(1, 1), (0, 0)]


# --- the LLaVA format


def test_markers_become_parts_in_place(write, image_folder):
    talk = dialogue("<image>\nfirst\n<image>second <image> third", "one", "and\n<image>", "A literal <image> stays")
    path = write([{"image": ["a.png", "b.png", "c.png", "a.png"], "conversations": talk}], as_list=True)
    (row,) = read_llava_json(path, image_folder)
    assert row.messages[0]["content"] == [IMAGE, text("first"), IMAGE, text("second "), IMAGE, text(" third")]
    assert row.messages[2]["content"] == [text("and"), IMAGE]
    assert row.messages[3]["content"] == [text("A literal <image> stays")]


def test_without_a_marker_one_image_goes_first_and_several_are_an_error(write, image_folder):
    (row,) = read_llava_json(write([{"image": "a.png", "conversations": dialogue("Hi", "Yes")}]), image_folder)
    assert row.messages[0]["content"] == [IMAGE, text("Hi")]
    with pytest.raises(DataError, match="2 in `image` but 0 <image>"):
        read_llava_json(write([{"image": ["a.png", "b.png"], "conversations": dialogue("Hi", "Yes")}]), image_folder)


def test_unlabelled_rows_are_safe_only_on_request(write):
    path = write([{"conversations": dialogue("Hi", "Yes")}])
    assert [(row.category, row.level) for row in read_rows(path)] == [(None, None)]
    assert [(row.category, row.level) for row in read_rows(path, assume_safe=True)] == [(6, 0)]
    (row,) = read_rows(path, assume_safe=True, labels=SafetyLabels(("bad", "good"), safe_category="good"))
    assert (row.category, row.level) == (1, 0)


def test_labels_are_never_dropped_by_reading_in_the_wrong_format(write, image_folder, safevlm_record):
    (row,) = read_llava_json(write([safevlm_record()]), image_folder, assume_safe=True)
    assert (row.category, row.level) == (1, 3)


def test_prompts_without_answer_are_read_on_request(write):
    (row,) = read_rows(write([{"conversations": dialogue("Hi")}]), require_answer=False)
    assert len(row.messages) == 1


# --- images on disk


@pytest.mark.parametrize("name", ["../rows.jsonl", "/etc/hostname", "x/../../rows.jsonl", "../images-2/a.png"])
def test_image_path_may_not_leave_the_folder(write, image_folder, safevlm_record, name):
    with pytest.raises(DataError, match="leaves `image_folder`"):
        read_rows(write([safevlm_record(image=name)]), image_folder, check_images="none")


def test_paths_inside_the_folder_may_be_absolute_dotted_or_linked(write, image_folder, tmp_path, safevlm_record):
    (tmp_path / "elsewhere").mkdir()
    (image_folder / "a.png").rename(tmp_path / "elsewhere/a.png")
    (image_folder / "link").symlink_to(tmp_path / "elsewhere")
    names = ["link/a.png", "./sub/../b.png", str(image_folder / "c.png")]
    rows = read_rows(write([safevlm_record(image=name) for name in names]), image_folder)
    assert [os.path.relpath(row.images[0], image_folder) for row in rows] == ["link/a.png", "b.png", "c.png"]


def test_image_folder_defaults_to_the_folder_of_the_file(write, image_folder, safevlm_record):
    (row,) = read_rows(write([safevlm_record(image="images/a.png")]))
    assert row.images == (image_folder / "a.png",)
    with pytest.raises(DataError, match="`image_folder` .* is not a folder"):
        read_rows(write([safevlm_record()]), image_folder / "nowhere")


def test_check_images_decides_when_damage_is_found(write, image_folder, safevlm_record):
    broken, missing = write([safevlm_record(image="broken.png")]), safevlm_record(image="missing.png")
    (row,) = read_rows(broken, image_folder, check_images="header")
    with pytest.raises(ImageError, match="rows.jsonl:1"):
        row.load_images()
    with pytest.raises(ImageError) as caught:
        read_rows(write([missing]), image_folder, check_images="header")
    assert caught.value.row_id == "rows.jsonl:1" and caught.value.reason == "does not exist"
    assert len(read_rows(write([missing]), image_folder, check_images="none")) == 1
    with pytest.raises(ImageError, match="`max_pixels`"):
        read_rows(write([safevlm_record()]), image_folder, max_pixels=15)


# --- containers and formats


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "has no rows"),
        (b"[]", "has no rows"),
        (b"[{]", "invalid JSON .*cannot be read in part"),
        (b'[{"conversations": "\xff"}]', "invalid JSON"),
        (b"{", "no known format"),
        (b"[" * 100_000, "invalid JSON"),
        (b'{"a": 1}', "the keys \\['a'\\]; known formats are"),
    ],
)
@pytest.mark.parametrize("on_error", ["raise", "skip"])
@pytest.mark.usefixtures("uncollected")
def test_unreadable_file_is_an_error_in_any_case(tmp_path, content, reason, on_error):
    path = tmp_path / "x.json"
    path.write_bytes(content)
    with pytest.raises(DataError, match=reason) as caught:
        read_rows(path, on_error=on_error)
    assert str(path) in str(caught.value)
    with pytest.raises(DataError, match="cannot be read"):
        read_rows(tmp_path / "missing.json", on_error=on_error)


def test_bad_lines_are_named_and_good_ones_kept(tmp_path):
    good = json.dumps({"conversations": dialogue("Hi\u2028there", "Yes")}, ensure_ascii=False).encode()
    path = tmp_path / "rows.jsonl"
    path.write_bytes(
        b"\n".join([b"\xef\xbb\xbf" + good, b"", b"{oops", b'"text"', b"\xff", b"1" * 5000, good + b"\r"])
    )
    rows = read_rows(path, on_error="skip")
    assert [row.row_id for row in rows] == ["rows.jsonl:1", "rows.jsonl:7"]
    assert [row_id for row_id, _ in rows.skipped] == [f"rows.jsonl:{line}" for line in (3, 4, 5, 6)]
    with pytest.raises(DataError, match="line 3: invalid JSON"):
        read_rows(path)


def test_several_paths_are_read_in_order_each_in_its_own_format(write, tmp_path, image_folder, safevlm_record):
    first = write([safevlm_record(id="1"), safevlm_record(id="2", safe_type=17)])
    second = write([{"id": "3", "conversations": dialogue("Hi", "Yes")}], as_list=True)
    rows = read_rows([first, second], image_folder, on_error="skip")
    assert [row.row_id for row in rows] == ["1", "3"]
    assert [row_id for row_id, _ in rows.skipped] == ["2"]


def test_single_options_go_before_those_of_the_options_object(write, image_folder, safevlm_record):
    path = write([safevlm_record(id="1"), safevlm_record(id="2", image="broken.png")])
    options = ReadOptions(check_images="none", source="mine")
    assert [row.source for row in read_rows(path, image_folder, options)] == ["mine", "mine"]
    with pytest.raises(ImageError, match="broken.png"):
        read_rows(path, image_folder, options, check_images="full")
    with pytest.raises(TypeError, match="'colour'"):
        read_rows(path, image_folder, colour="red")


def test_format_is_recognised_from_the_content(write, safevlm_record):
    assert detect_format(write([safevlm_record()])) == "safevlm"
    assert detect_format(write([5, safevlm_record()], as_list=True)) == "safevlm"
    assert detect_format(write([{"id": 1, "conversations": dialogue("Hi", "Yes")}])) == "llava"
    with pytest.raises(DataError, match="known formats are"):
        detect_format(write([{"id": 1}]))


def test_a_format_can_be_added(write, monkeypatch):
    monkeypatch.setattr(formats, "FORMATS", dict(formats.FORMATS))

    def parse(record, **_):
        return {"images": [], "messages": [{"role": "user", "content": [text(record["ask"])]}]}

    register_format("asks", RowFormat(lambda record: "ask" in record, parse))
    (row,) = read_rows(write([{"ask": "Why?"}]), require_answer=False)
    assert row.messages[0]["content"] == [text("Why?")]
    with pytest.raises(ValueError, match="must be new"):
        register_format("llava", RowFormat(lambda record: True, parse))


@pytest.mark.parametrize("option", [{"on_error": "ignore"}, {"check_images": "maybe"}, {"format": "csv"}])
def test_unknown_option_value_is_an_error_naming_it(write, option):
    (name,) = option
    with pytest.raises(ValueError, match=f"`{name}` must be one of"):
        read_rows(write([{"conversations": dialogue("Hi", "Yes")}]), **option)


# --- properties

JUNK = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=8,
)
TURN = st.fixed_dictionaries({}, optional={"from": st.sampled_from(["USER", "gpt"]) | JUNK, "value": JUNK})
RECORD = st.fixed_dictionaries(
    {},
    optional={
        "id": JUNK,
        "image": st.text() | st.sampled_from(["a.png", "a.png<split>b.png", "<split>"]) | JUNK,
        "safe_type": st.integers(0, 6) | JUNK,
        "safe_level": st.integers(0, 3) | JUNK,
        "system_prompt": JUNK,
        "conversations": st.lists(TURN | JUNK, max_size=3) | st.just(dialogue("Hi", "Yes")) | JUNK,
    },
)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(RECORD | JUNK, min_size=1, max_size=3), st.booleans(), st.sampled_from(["safevlm", "llava", None]))
def test_any_json_is_read_or_raises_data_error(write, image_folder, records, as_list, format):
    assume(as_list or not isinstance(records[0], list))  # a file that begins with [ is one JSON list
    path = write(records, as_list=as_list)
    try:
        rows = read_rows(path, image_folder, format=format)
    except DataError as error:
        str(error).encode()  # can be logged
    else:
        assert len(rows) == len(records)
    try:
        rows = read_rows(path, image_folder, format=format, on_error="skip")
    except DataError as error:
        assert format is None and "no known format" in str(error)
    else:
        assert len(rows) + len(rows.skipped) == len(records)


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.binary(max_size=200) | st.text(max_size=200).map(str.encode))
def test_any_bytes_raise_only_data_error(tmp_path, content):
    (tmp_path / "x").write_bytes(content)
    for on_error in ("raise", "skip"):
        try:
            read_rows(tmp_path / "x", on_error=on_error)
        except DataError:
            pass


TEXT = st.text(st.characters(exclude_categories=["Cs"]), min_size=1).filter(str.strip)
USER_TEXT = TEXT.filter(lambda value: "<image>" not in value)


@st.composite
def labelled_rows(draw, folder):
    messages, images = [], []
    if draw(st.booleans()):
        messages.append({"role": "system", "content": [text(draw(TEXT))]})
    for _ in range(draw(st.integers(1, 3))):
        content = [IMAGE] * draw(st.integers(0, 2))
        content += (
            [text(draw(USER_TEXT))] + [IMAGE] * draw(st.integers(0, 2)) + draw(st.sampled_from([[], [text("?")]]))
        )
        if content[-1] == text("?") and content[-2] != IMAGE:
            content.pop()  # two texts in a row are one text to the format
        images += [folder / draw(st.sampled_from(["a.png", "b.png", "c.png"])) for part in content if part == IMAGE]
        messages += [{"role": "user", "content": content}, {"role": "assistant", "content": [text(draw(TEXT))]}]
    category = draw(st.none() | st.integers(0, 6))
    level = draw(st.sampled_from([0, None]) if category == 6 else st.none() | st.integers(0, 3))
    source, split = draw(st.sampled_from(["rows", "VLGuard"])), draw(st.sampled_from(["", "test"]))
    return SafetyRow(draw(TEXT), images, messages, category, level, source, split, draw(st.none() | st.booleans()))


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_written_rows_read_back_equal(tmp_path, image_folder, data):
    rows = data.draw(st.lists(labelled_rows(image_folder), min_size=1, max_size=3))
    write_safevlm_jsonl(rows, tmp_path / "rows.jsonl", image_folder)
    assert read_safevlm_jsonl(tmp_path / "rows.jsonl", image_folder) == rows


def test_newlines_beside_an_image_survive_writing(tmp_path, image_folder):
    content = [text("before\n"), IMAGE, text("\nbetween\n"), IMAGE, IMAGE, text("\n after")]
    messages = [{"role": "user", "content": content}, {"role": "assistant", "content": [text("\nYes\n")]}]
    rows = [SafetyRow("r", [image_folder / "a.png"] * 3, messages, 6, 0, "rows")]
    write_safevlm_jsonl(rows, tmp_path / "rows.jsonl", image_folder)
    assert read_safevlm_jsonl(tmp_path / "rows.jsonl", image_folder) == rows


# --- writing


def test_rows_the_format_cannot_hold_are_refused_and_the_old_file_kept(tmp_path, image_folder):
    path = tmp_path / "rows.jsonl"
    path.write_text("old")

    def row(value="Hi", images=(), **labels):
        content = [IMAGE] * len(images) + [text(value)]
        return SafetyRow("r1", images, [{"role": "user", "content": content}], **labels)

    labels = {"category": 6, "level": 0}
    for bad, reason in (
        (row("an <image> here", **labels), "spells <image>"),
        (row(images=(b"png",), **labels), "save it to a file"),
        (row(images=(tmp_path / "outside.png",), **labels), "must lie in"),
        (row(images=(image_folder / "x<split>y.png",), **labels), "not spell <split>"),
    ):
        with pytest.raises(DataError, match=f"row 'r1': .*{reason}"):
            write_safevlm_jsonl([row(**labels), bad], path, image_folder)
    assert path.read_text() == "old" and sorted(os.listdir(tmp_path)) == ["images", "rows.jsonl"]


def test_rows_is_a_list_that_remembers_what_was_skipped():
    assert Rows() == [] and Rows().skipped == [] and Rows(skipped=[("1", "bad")]).skipped == [("1", "bad")]
