"""Data files as they come: line ends, byte order marks, odd and hostile JSON. Nothing in them is lost in silence."""

import json

import pytest

from safevlm.trainer.data import DataError, read_rows
from safevlm.trainer.data.containers import data_files


def record(number, **changes):
    return {"id": f"{number}", "messages": [{"role": "user", "content": f"Q{number}"}], "category": 4, **changes}


def lines(*records):
    return [json.dumps(record).encode() for record in records]


@pytest.fixture
def read(tmp_path):
    def read(content, name="rows.jsonl", **options):
        path = tmp_path / name
        path.write_bytes(content)
        return read_rows(path, **options)

    return read


@pytest.mark.parametrize("before", [b"", b"\n", b"\n\n \n", b"\xef\xbb\xbf", b"\xef\xbb\xbf\r\n"])
@pytest.mark.parametrize("end", [b"\n", b"\r\n", b"\r"])
@pytest.mark.parametrize("count", [1, 3])
def test_rows_are_read_whatever_ends_lines_and_comes_first(read, before, end, count):
    rows = read(before + end.join(lines(*(record(n) for n in range(count)))) + end)
    assert [row.row_id for row in rows] == [f"{n}" for n in range(count)]


def test_bad_line_is_named_by_its_number_whatever_ends_lines(read):
    for end in (b"\n", b"\r\n", b"\r"):
        rows = read(end.join([*lines(record(1)), b"", b"{oops", *lines(record(4))]), on_error="skip")
        assert [row.row_id for row in rows] == ["1", "4"] and rows.skipped[0][0] == "rows.jsonl:3"


@pytest.mark.parametrize("break_", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("name", ["safevlm", "llava", "mllm"])
def test_line_break_after_a_marker_belongs_to_it(read, image_folder, break_, name):
    text = f"<image>{break_}What is\r\nthis?"
    turns = {"conversations": [{"from": "human", "value": text}]}
    if name == "mllm":
        turns = {"messages": [{"role": "user", "content": text}]}
    labels = {"safe_type": 4, "safe_level": 1} if name == "safevlm" else {"category": 4}
    (row,) = read(*lines({**turns, **labels, "image": "a.png"}), image_folder=image_folder)
    assert row.messages[0]["content"] == [{"type": "image"}, {"type": "text", "text": "What is\r\nthis?"}]


def test_line_break_before_a_marker_belongs_to_it(read, image_folder):
    for break_ in ("\n", "\r\n"):
        turns = [{"role": "user", "content": f"What is this?{break_}<image>"}]
        (row,) = read(*lines(record(1, messages=turns, image="a.png")), image_folder=image_folder)
        assert row.messages[0]["content"] == [{"type": "text", "text": "What is this?"}, {"type": "image"}]


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (json.dumps([record(1)]).encode("utf-16"), "is UTF-16; save it as UTF-8"),
        (b"[" + lines(record(1))[0] + b",]", "invalid JSON .*line 1 column"),
        (lines(record(1))[0] + b",\n", "no known format.*line 1: invalid JSON"),
        (b"'a': 1", "no known format.*line 1: invalid JSON"),
        (b"\xef\xbb\xbf", "has no rows"),
        (b'{"a": [' + b"[" * 100_000, "line 1: invalid JSON"),
        (json.dumps(record(1), indent=2).encode(), "is one JSON object, not a list of rows"),
        (json.dumps({"rows": [record(1)]}).encode(), r"no known format, it has the keys \['rows'\]"),
    ],
)
@pytest.mark.usefixtures("uncollected")
def test_file_that_is_not_what_it_seems_is_an_error_that_says_why(read, content, reason):
    for on_error in ("raise", "skip"):
        with pytest.raises(DataError, match=reason):
            read(content, on_error=on_error)


def test_key_that_occurs_twice_is_an_error_as_its_first_value_would_be_lost(read):
    twice = b'{"messages": [{"role": "user", "content": "Hi"}], "image": "a.png", "image": "b.png", "category": 1}'
    with pytest.raises(DataError, match="line 2: invalid JSON .the key 'image' occurs twice"):
        read(b"\n".join([*lines(record(1)), twice]))
    with pytest.raises(DataError, match="the key 'image' occurs twice"):
        read(b"[" + twice + b"]")
    with pytest.raises(DataError, match="the key '1' occurs twice"):
        read(b'{"1": {"Question": "q"}, "1": {"Question": "q"}}')


def test_line_longer_than_the_limit_is_an_error_whatever_comes_next(read, monkeypatch):
    monkeypatch.setattr(data_files, "MAX_LINE_BYTES", 1000)
    long = lines(record(2, note="x" * 2000))[0]
    with pytest.raises(DataError, match="line 2 has more than 1000 bytes"):
        read(b"\n".join([*lines(record(1)), long, *lines(record(3))]), on_error="skip")


@pytest.mark.usefixtures("uncollected")
def test_deeply_nested_metadata_is_kept_or_refused_but_breaks_nothing(read):
    for depth in (50, 500, 5000):
        content = lines(record(1))[0][:-1] + b', "deep": ' + b"[" * depth + b"]" * depth + b"}"
        try:
            (row,) = read(content)
        except DataError:
            continue
        assert row.metadata.keys() == {"deep"} or depth == 0
