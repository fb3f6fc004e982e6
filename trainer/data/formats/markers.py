"""Image markers in texts: `<image>` in a user turn is where a picture goes."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from safevlm.trainer.data.errors import DataError, short

IMAGE_MARKER = "<image>"
IMAGE_SEPARATOR = "<split>"  # between the names of several images
# What marks a picture, a video or a sound here, in other model families and tools, and in Markdown.
ANY_MARKER = re.compile(
    r"<img>.*?</img>|<image[ _-]?\d*>|<(?:video|audio|imagehere|im_patch|img)>|\[img\]"
    r"|<\|(?:image|img|video|audio|vision|media)\w*\|>|!\[[^\]\n]*\]\([^)\n]+\)",
    re.IGNORECASE,
)
# One line break on either side belongs to the marker, in the style of any system; a lone \r before it may end a text.
_MARKER_LINE = re.compile(rf"(?:\r?\n)?({IMAGE_MARKER})(?:\r\n?|\n)?")


def place_images(
    turns: Sequence[tuple[str, str]], num_images: int, field: str, one_marker_for_all: bool = False
) -> list[dict[str, Any]]:
    """
    Turns texts into messages: each marker in a user turn becomes an image part.

    Args:
        turns (`Sequence[tuple[str, str]]`): Role and text of each turn.
        num_images (`int`): How many images the row has.
        field (`str`): The field that holds them, in errors.
        one_marker_for_all (`bool`): Whether a single marker stands for all images; without any marker they go before
            the first question. Otherwise only a single image may lack its marker, as in LLaVA.

    Raises:
        `DataError`: The numbers of images and markers differ, or a user turn has a marker that no image belongs to.
    """
    num_markers = sum(text.count(IMAGE_MARKER) for role, text in turns if role == "user")
    per_marker = max(num_images, 1) if one_marker_for_all and num_markers <= 1 else 1
    place_first = num_images > 0 and num_markers == 0 and (one_marker_for_all or num_images == 1)
    if not place_first and num_markers * per_marker != num_images:
        raise DataError(
            f"{num_images} in `{field}` but {num_markers} {IMAGE_MARKER} in the user turns; make them agree"
        )
    messages = []
    for number, (role, text) in enumerate(turns, start=1):
        content = []
        if role == "user":
            _check_markers(text, number, field)
            if place_first:
                content, place_first = _image_parts(per_marker), False
            content += _parts(text, per_marker)
        elif text.strip():
            content.append({"type": "text", "text": text})
        messages.append({"role": role, "content": content})
    return messages


def _check_markers(text: str, number: int, field: str) -> None:
    marker = ANY_MARKER.search(text.replace(IMAGE_MARKER, ""))
    if marker:
        raise DataError(
            f"turn {number} (user) has {short(marker[0])}, for which there is no picture: write {IMAGE_MARKER} and "
            f"name the picture in `{field}`; videos and sounds cannot be read. If it is meant as a text, write "
            'the row as `messages` with `content` [{"type": "text", "text": ...}]'
        )


def _parts(text: str, images_per_marker: int) -> list[dict[str, Any]]:
    parts = []
    for piece in _MARKER_LINE.split(text):
        if piece == IMAGE_MARKER:
            parts += _image_parts(images_per_marker)
        elif piece.strip():
            parts.append({"type": "text", "text": piece})
    return parts


def _image_parts(count: int) -> list[dict[str, str]]:
    return [{"type": "image"} for _ in range(count)]
