"""Writes rows as a PSA-VLM/SafeVLM JSONL file, the inverse of `read_safevlm_jsonl`."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path

from safevlm.files import replace_text

from .archives import ArchivedImage
from .errors import DataError
from .formats.markers import ANY_MARKER, IMAGE_MARKER, IMAGE_SEPARATOR
from .images import ImageSource
from .safety_row import SafetyRow

_SPEAKERS = {"user": "USER", "assistant": "ASSISTANT", "system": "SYSTEM"}


def write_safevlm_jsonl(
    rows: Iterable[SafetyRow], path: str | os.PathLike, image_folder: str | os.PathLike | None = None
) -> None:
    """Writes rows with image paths relative to `image_folder`; replaces `path` only when complete.

    Besides the format's own fields, the known ones of `source`, `split`, `question_dependent` and `metadata` are
    written. Unknown labels become null, and values that JSON has no type for, such as dates in the metadata, become
    texts.

    Args:
        rows (`Iterable[SafetyRow]`): Rows whose images are paths inside `image_folder`.
        path (`str` or `os.PathLike`): The file to write.
        image_folder (`str` or `os.PathLike`, *optional*): Defaults to the folder of `path`.

    Raises:
        `DataError`: The format cannot hold a row: an image in memory or outside the folder, or a text that spells
            `<image>`. Nothing is written.
    """
    path = Path(path)
    folder = Path(os.path.abspath(path.parent if image_folder is None else image_folder))
    lines = [json.dumps(_record(row, folder), ensure_ascii=False, default=str) + "\n" for row in rows]
    replace_text(path, "".join(lines))


def _record(row: SafetyRow, folder: Path) -> dict:
    record = {"id": row.row_id, "safe_type": row.category, "safe_level": row.level}
    for field in ("source", "split", "question_dependent", "metadata"):
        if getattr(row, field) not in ("", None, {}):
            record[field] = getattr(row, field)
    if row.images:
        names = [_relative_name(image, folder, row.row_id) for image in row.images]
        record["image"] = IMAGE_SEPARATOR.join(names)
    record["conversations"] = [
        {"from": _SPEAKERS[turn["role"]], "value": _text_with_markers(turn, row.row_id)} for turn in row.messages
    ]
    return record


def _relative_name(image: ImageSource, folder: Path, row_id: str) -> str:
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


def _text_with_markers(turn: dict, row_id: str) -> str:
    """The parts of a turn as one text, in which each image marker has a line of its own."""
    text = ""
    for part in turn["content"]:
        if part["type"] == "image":
            # A reader takes \r\n before a marker for one line break, so none is added after \r.
            starts_line = not text or text.endswith((f"{IMAGE_MARKER}\n", "\r"))
            text += ("" if starts_line else "\n") + f"{IMAGE_MARKER}\n"
        elif turn["role"] == "user" and (marker := ANY_MARKER.search(part["text"])):
            raise DataError(f"row {row_id!r}: the text of a user turn spells {marker[0]}, a marker in this format.")
        else:
            text += part["text"]
    return text
