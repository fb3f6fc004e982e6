"""Which format a data set is in, recognised from its first records."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .containers.container import OpenedContainer
from .containers.data_files import decode
from .errors import DataError, short
from .formats import format_of, known_formats

_RECOGNISE_WITHIN = 1000  # records


def recognise_format(path: Any, containers: Sequence[OpenedContainer]) -> str:
    """The name of the format that all containers of a path are in. In each, the first record that fits any decides.

    Raises:
        `DataError`: No format fits, several do, or the containers differ.
    """
    if len(containers) == 1:
        return _recognise_one(containers[0])
    found = {opened.container.name: _recognise_or_none(opened) for opened in containers}
    if len(set(found.values())) == 1 and None not in found.values():
        return next(iter(found.values()))
    listed = ", ".join(f"{name} ({format_name or 'no known format'})" for name, format_name in found.items())
    raise DataError(f"{path}: holds {len(found)} data files; pass one of them: {listed}.")


def _recognise_or_none(opened: OpenedContainer) -> str | None:
    try:
        return _recognise_one(opened)
    except DataError:
        return None


def _recognise_one(opened: OpenedContainer) -> str:
    name = opened.container.name
    empty, first_record, reason = True, None, ""
    for item in opened.peek(_RECOGNISE_WITHIN):
        empty = False
        try:
            record = decode(item.value)
        except DataError as error:
            reason = reason or f" ({opened.unit} {item.number}: {error})"
            continue
        first_record = record if first_record is None else first_record
        try:
            format_name = format_of(record)
        except DataError as error:
            raise DataError(f"{name}: {error}.") from None
        if format_name is not None:
            return format_name
    if empty:
        raise DataError(f"{name}: has no rows.")
    if first_record is None:
        content = f"no JSON object, one per line or in a list{reason}"
    else:
        content = f"the keys {short(sorted(map(str, first_record)))}"
    raise DataError(
        f"{name}: has no known format, it has {content}; known formats are {sorted(known_formats())}. "
        "Choose one with `format`, or name the fields in a `taxonomy`."
    )
