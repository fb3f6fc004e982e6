"""Reads JSON lists, JSONL, csv and parquet files record by record.

JSON lists, and JSON objects that map ids to records as in MM-SafetyBench, are read whole. Damaged or hostile files
raise `DataError`; a bad record does not hide the next one.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from safevlm.trainer.data.errors import DataError, short

DATA_SUFFIXES = (".json", ".jsonl", ".ndjson", ".csv", ".tsv", ".parquet")
MAX_DATA_BYTES = 4 * 2**30  # for a JSON list, and for any data file in a zip
MAX_LINE_BYTES = 64 * 2**20
_MAX_MAPPING_BYTES = 64 * 2**20


class Item(NamedTuple):
    """One record, counted from 1. `value` is a dict, undecoded JSON (`bytes`), or the `DataError` for a bad record."""

    number: int
    value: Any


def read_records(open_file: Callable[[], BinaryIO], suffix: str, name: Path) -> tuple[str, Iterator[Item]]:
    """What a record of the file is called (`"line"`, `"item"` or `"row"`), and an iterator over its records.

    Args:
        open_file (`Callable`): Opens the file from its start.
        suffix (`str`): With the dot, in lower case.
        name (`Path`): The file in error messages.

    Raises:
        `DataError`: The file is not a data file. While iterating: the rest of it cannot be read.
    """
    with open_file() as stream:
        start = stream.read(4)
        if start == b"PAR1":
            return "row", _parquet(open_file, name)
        if suffix in (".csv", ".tsv"):
            return "row", _csv(open_file, "\t" if suffix == ".tsv" else ",", name)
        if start.startswith((b"\xff\xfe", b"\xfe\xff")):
            raise DataError(f"{name}: is UTF-16; save it as UTF-8.")
        first = start.removeprefix(b"\xef\xbb\xbf").lstrip()
        while not first and (start := stream.read(4096)):
            first = start.lstrip()
    if first[:1] == b"[":
        return "item", _json_list(open_file, name)
    if first[:1] == b"{" and (mapping := _json_mapping(open_file, name)) is not None:
        return "item", mapping
    return "line", _json_lines(open_file, name)


def decode(value: Any) -> dict:
    """The value of an `Item` as a dict.

    Raises:
        `DataError`: It is not a JSON object.
    """
    if isinstance(value, DataError):
        raise value
    if isinstance(value, bytes):
        value = _decode_json(value)
    if not isinstance(value, dict):
        raise DataError(f"a row must be a JSON object, got {short(value)}")
    return value


def _json_list(open_file: Callable[[], BinaryIO], name: Path) -> Iterator[Item]:
    with open_file() as stream:
        data = stream.read(MAX_DATA_BYTES + 1)
    if len(data) > MAX_DATA_BYTES:
        raise DataError(f"{name}: is a JSON list of more than {MAX_DATA_BYTES} bytes; convert it to JSONL.")
    try:
        records = _decode_json(data.removeprefix(b"\xef\xbb\xbf"))
    except DataError as error:
        raise DataError(f"{name}: {error}; as one JSON list it cannot be read in part.") from error
    return (Item(number, record) for number, record in enumerate(records, start=1))


def _json_mapping(open_file: Callable[[], BinaryIO], name: Path) -> Iterator[Item] | None:
    """The records of `{"0": {...}, "1": {...}}` with their keys as `id`; `None` if the file is JSONL."""
    with open_file() as stream:
        line = stream.readline(_MAX_MAPPING_BYTES).removeprefix(b"\xef\xbb\xbf")
        while not line.strip():  # terminates: the file starts with a {
            line = stream.readline(_MAX_MAPPING_BYTES)
        try:
            content = _decode_json(line)
        except DataError:
            data = line + stream.read(_MAX_MAPPING_BYTES)
            try:
                content = _decode_json(data)
            except DataError:
                return None
            if not _is_mapping(content):
                raise DataError(f"{name}: is one JSON object, not a list of rows or one row per line.") from None
    if not _is_mapping(content):
        return None
    return (Item(number, {"id": key, **value}) for number, (key, value) in enumerate(content.items(), start=1))


def _is_mapping(content: Any) -> bool:
    return (
        isinstance(content, dict)
        and bool(content)
        and all(key.isdecimal() and isinstance(value, dict) and value for key, value in content.items())
    )


def _json_lines(open_file: Callable[[], BinaryIO], name: Path) -> Iterator[Item]:
    with open_file() as stream:
        number = 0
        while line := _guard(name, stream.readline, MAX_LINE_BYTES + 1):
            if len(line) > MAX_LINE_BYTES:
                raise DataError(f"{name}: line {number + 1} has more than {MAX_LINE_BYTES} bytes; is it JSONL?")
            for text in line.rstrip(b"\r\n").split(b"\r"):  # line ends of old Macs; JSON texts hold no bare \r
                number += 1
                text = text.removeprefix(b"\xef\xbb\xbf") if number == 1 else text
                if text.strip():
                    yield Item(number, text)


def _csv(open_file: Callable[[], BinaryIO], delimiter: str, name: Path) -> Iterator[Item]:
    with open_file() as stream, io.TextIOWrapper(stream, encoding="utf-8-sig", newline="") as text:
        rows = csv.reader(text, delimiter=delimiter, strict=True)
        header = _guard(name, next, rows, [])
        if len(set(header)) < len(header) or "" in header:
            raise DataError(f"{name}: its first line must name the columns, each once, got {short(header)}.")
        number = 0
        while (row := _guard(name, next, rows, None)) is not None:
            if not row:
                continue
            number += 1
            if len(row) != len(header):
                yield Item(number, DataError(f"{len(row)} fields, but the first line names {len(header)} columns"))
            else:
                yield Item(number, dict(zip(header, row, strict=True)))


def _parquet(open_file: Callable[[], BinaryIO], name: Path) -> Iterator[Item]:
    import pyarrow.parquet

    with open_file() as stream:
        table = _guard(name, pyarrow.parquet.ParquetFile, stream)
        # Small batches: a row may hold megabytes of images.
        batches = table.iter_batches(batch_size=16)
        number = 0
        while (batch := _guard(name, next, batches, None)) is not None:
            for record in _guard(name, batch.to_pylist):
                number += 1
                yield Item(number, record)


def _guard(name: Path, call: Callable, *args: Any) -> Any:
    """`call(*args)`, with whatever a damaged or hostile file makes it raise as a `DataError`."""
    try:
        return call(*args)
    except DataError:
        raise
    except Exception as error:  # csv.Error, UnicodeDecodeError, zlib.error, BadZipFile, pyarrow.ArrowInvalid, ...
        raise DataError(f"{name}: cannot be read ({type(error).__name__}: {error}); repair the file.") from None


def _decode_json(data: bytes) -> Any:
    try:
        return json.loads(data.decode(), object_pairs_hook=_without_repeats)
    except (ValueError, RecursionError) as error:  # ValueError: bad JSON or UTF-8, an integer of thousands of digits
        raise DataError(f"invalid JSON ({error})") from None


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """The object with these pairs; an error if a key is repeated, of which `json` would keep the last."""
    record = dict(pairs)
    if len(record) < len(pairs):
        keys = [key for key, _ in pairs]
        repeated = next(key for key in keys if keys.count(key) > 1)
        raise DataError(f"the key {short(repeated)} occurs twice in one object")
    return record
