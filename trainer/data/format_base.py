"""What the formats share: their interface, and small checks of fields."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, NamedTuple

from PIL import Image

from .errors import DataError
from .schema import check_text, short
from .taxonomy import Taxonomy


class RowFormat(NamedTuple):
    """A record format.

    Args:
        matches (`Callable[[dict], bool]`): Whether a record looks like this format, by its keys.
        parse (`Callable`): `parse(record, *, labels, assume_safe, context)` returns a dict, or a list of them for
            several rows, or raises `DataError`. Keys: `images` (names relative to the image folder, bytes, or
            `{"bytes", "path"}`) and `messages`; optional are `row_id`, `source`, `split`, `question_dependent`,
            `metadata`, and either `category` and `level` or `facts`, a dict from which the taxonomy takes the labels.
            `used` names the record's fields that went into all this: of the others those that carry pictures, turns
            or labels are refused, and the rest is the row's metadata. Take `**_` for what you don't need.
        spans_files (`bool`, *optional*, defaults to `False`): Whether all data files of a folder belong together.
    """

    matches: Callable[[dict], bool]
    parse: Callable[..., dict[str, Any] | list[dict[str, Any]]]
    spans_files: bool = False


class Context(NamedTuple):
    """Where a record comes from.

    Args:
        stem (`str`): The data file's name without extension.
        facts (`dict[str, str]`): `$file` (the stem), `$folder`, `$split`, `$subset`, for taxonomies.
        taxonomy (`Taxonomy`, *optional*): The set's labels and field names.
    """

    stem: str
    facts: dict[str, str]
    taxonomy: Taxonomy | None


def image_list(images: Any, field: str = "image") -> list[Any]:
    """The images of a field that holds one, a list of them, or none."""
    if images is None:
        return []
    images = list(images) if isinstance(images, (list, tuple)) else [images]
    for image in images:
        name = os.fspath(image) if isinstance(image, os.PathLike) else image
        if isinstance(image, Image.Image):  # in rows that were never in a file
            continue
        if isinstance(image, dict) and image.keys() <= {"bytes", "path"}:  # as `datasets` and parquet files embed them
            if isinstance(image.get("bytes"), bytes) and image["bytes"]:
                continue
            name = image.get("path")
        elif isinstance(image, bytes) and image:
            continue
        if not isinstance(name, str) or not name.strip():
            raise DataError(
                f"`{field}` must be a path, the bytes of a file, a PIL image, or a list of these, "
                f"got {short(images)}; leave it out for text only"
            )
        if "\0" in check_text(name, f"`{field}`"):
            raise DataError(f"`{field}` {short(images)} holds a NUL character; correct the path")
        if name.startswith(("http:", "https:", "data:")):
            raise DataError(f"`{field}` {short(name)} is a URL, which is never fetched; download it to a file")
    return images


def text_field(record: dict, field: str) -> str:
    """A field that must be a text that is not blank."""
    if record.get(field) is None:
        raise DataError(f"`{field}` is missing, the record has {short(sorted(map(str, record)))}")
    text = check_text(record[field], f"`{field}`")
    if not text.strip():
        raise DataError(f"`{field}` is empty; drop the row or give it a text")
    return text


def optional_text(record: dict, field: str | None) -> str | None:
    """A field's text; `None` if there is no such field or it is null or empty."""
    value = None if field is None else record.get(field)
    return None if value is None or value == "" else check_text(value, f"`{field}`")


def identifier(record: dict, field: str) -> str:
    """A field that names something: a text or an integer, as text."""
    value = record.get(field)
    if type(value) not in (str, int) or value == "":
        raise DataError(f"`{field}` must be a string or an integer, got {short(value)}")
    return check_text(str(value), f"`{field}`")


def single_turn(num_images: int, question: str, answer: str | None = None, system: str | None = None) -> list[dict]:
    """Messages of one question, images first; without an answer they end in the user's turn."""
    messages = []
    if system:
        messages.append({"role": "system", "content": [{"type": "text", "text": system}]})
    content = [{"type": "image"} for _ in range(num_images)]
    messages.append({"role": "user", "content": [*content, {"type": "text", "text": question}]})
    if answer is not None:
        messages.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})
    return messages
