"""Writing rows as a PSA-VLM/SafeVLM JSONL file, the inverse of `read_safevlm_jsonl`."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path

from .archives import ArchivedImage
from .errors import DataError
from .formats.markers import ANY_MARKER, IMAGE_MARKER, IMAGE_SEPARATOR
from .safety_row import SafetyRow

_SPEAKERS = {"user": "USER", "assistant": "ASSISTANT", "system": "SYSTEM"}


def write_safevlm_jsonl(
    rows: Iterable[SafetyRow], path: str | os.PathLike, image_folder: str | os.PathLike | None = None
) -> None:
    """Writes rows with their image paths relative to `image_folder`; replaces `path` only when complete.

    Beside the format's own fields a row keeps `source`, `split`, `question_dependent` and `metadata`, where known, and
    an unknown label is written as null. What JSON has no type for, such as a date in the metadata, becomes a text.

    Args:
        rows (`Iterable[SafetyRow]`): Rows with images as paths inside `image_folder`.
        path (`str` or `os.PathLike`): The file to write.
        image_folder (`str` or `os.PathLike`, *optional*): Defaults to the folder of `path`.

    Raises:
        `DataError`: The format cannot hold a row (an image in memory or outside the folder, a text that
            spells `<image>`); nothing is written.
    """
    path = Path(path)
    folder = Path(os.path.abspath(path.parent if image_folder is None else image_folder))
    partial = path.with_name(path.name + ".partial")
    lines = [json.dumps(_record(row, folder), ensure_ascii=False, default=str) + "\n" for row in rows]
    partial.write_text("".join(lines), encoding="utf-8", newline="\n")
    os.replace(partial, path)


def _record(row: SafetyRow, folder: Path) -> dict:
    record = {"id": row.row_id, "safe_type": row.category, "safe_level": row.level}
    for field in ("source", "split", "question_dependent", "metadata"):
        if getattr(row, field) not in ("", None, {}):
            record[field] = getattr(row, field)
    if row.images:
        names = [_relative(image, folder, row.row_id) for image in row.images]
        record["image"] = IMAGE_SEPARATOR.join(names)
    record["conversations"] = [
        {"from": _SPEAKERS[turn["role"]], "value": _value(turn, row.row_id)} for turn in row.messages
    ]
    return record


def _relative(image, folder: Path, row_id: str) -> str:
    if not isinstance(image, (str, os.PathLike)):
        raise DataError(f"row {row_id!r}: an image in memory has no path to write; save it to a file first.")
    if isinstance(image, ArchivedImage):
        raise DataError(f"row {row_id!r}: image {os.fspath(image)!r} lies in a zip file; unpack it first.")
    path = Path(os.path.abspath(image))
    if not path.is_relative_to(folder) or IMAGE_SEPARATOR in str(path.relative_to(folder)):
        raise DataError(
            f"row {row_id!r}: image {str(path)!r} must lie in {str(folder)!r} and not spell {IMAGE_SEPARATOR}."
        )
    return path.relative_to(folder).as_posix()


def _value(turn: dict, row_id: str) -> str:
    """The parts as one text: a marker gets a line of its own."""
    value = ""
    for part in turn["content"]:
        if part["type"] == "image":
            own_line = not value or value.endswith((f"{IMAGE_MARKER}\n", "\r"))  # after \r, \n would be the marker's
            value += ("" if own_line else "\n") + f"{IMAGE_MARKER}\n"
        elif turn["role"] == "user" and (marker := ANY_MARKER.search(part["text"])):
            raise DataError(f"row {row_id!r}: the text of a user turn spells {marker[0]}, a marker in this format.")
        else:
            value += part["text"]
    return value
