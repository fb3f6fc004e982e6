"""What formats need to read single fields of a record, and to make the messages of a single question."""

from __future__ import annotations

import os
from typing import Any

from PIL import Image

from safevlm.trainer.data.errors import DataError, short
from safevlm.trainer.data.safety_row import check_text


def image_list(images: Any, field: str = "image") -> list[Any]:
    """The images of a field that holds one image, a list of images, or nothing."""
    if images is None:
        return []
    images = list(images) if isinstance(images, (list, tuple)) else [images]
    for image in images:
        name = os.fspath(image) if isinstance(image, os.PathLike) else image
        if isinstance(image, Image.Image):  # rows made in Python
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


def is_empty(value: Any) -> bool:
    """Whether a value is null, NaN, or an empty text, list or mapping: in tables every row has every field."""
    if isinstance(value, float):
        return value != value
    return value is None or (isinstance(value, (str, bytes, list, tuple, dict)) and len(value) == 0)


def text_field(record: dict, field: str) -> str:
    """A field that must hold a text that is not blank."""
    if record.get(field) is None:
        raise DataError(f"`{field}` is missing, the record has {short(sorted(map(str, record)))}")
    text = check_text(record[field], f"`{field}`")
    if not text.strip():
        raise DataError(f"`{field}` is empty; drop the row or give it a text")
    return text


def optional_text(record: dict, field: str | None) -> str | None:
    """The text of a field; `None` if the field is absent, null or empty."""
    value = None if field is None else record.get(field)
    return None if value is None or value == "" else check_text(value, f"`{field}`")


def identifier(record: dict, field: str) -> str:
    """A text or an integer that identifies something, as text."""
    value = record.get(field)
    if type(value) not in (str, int) or value == "":
        raise DataError(f"`{field}` must be a string or an integer, got {short(value)}")
    return check_text(str(value), f"`{field}`")


def single_turn(num_images: int, question: str, answer: str | None = None, system: str | None = None) -> list[dict]:
    """The messages of one question, images first. Without an answer they end with the user's turn."""
    messages = []
    if system:
        messages.append({"role": "system", "content": [{"type": "text", "text": system}]})
    content = [{"type": "image"} for _ in range(num_images)]
    messages.append({"role": "user", "content": [*content, {"type": "text", "text": question}]})
    if answer is not None:
        messages.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})
    return messages
