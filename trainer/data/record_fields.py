"""The fields of a record that its format does not use: refused where a picture, a turn or a label would be lost.

Everything else is metadata, which stays with the row. Fields are judged by their names and by what they hold.
"""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Mapping
from pathlib import PurePath
from typing import Any

from PIL import Image

from .errors import DataError
from .schema import short

_PICTURES = frozenset(
    "image images img imgs picture pictures pic pics photo photos screenshot screenshots frame frames video videos "
    "audio audios media pixel jpg jpeg png webp gif".split()
)
_ABOUT_PICTURES = frozenset(
    "path paths url urls uri file files filename name names bytes base64 b64 data list values input".split()
)
_TURNS = frozenset(
    "system system_prompt system_message prompt prompts query queries question questions instruction instructions input "
    "output history conversation conversations message messages dialog dialogue turns answer answers response responses "
    "completion completions chosen rejected reply tools functions tool_calls function_call reasoning_content".split()
)
_LABELS = frozenset(
    "safe unsafe safety label labels category categories subcategory level levels risk risks risky severity harm "
    "harmful harmfulness hazard hazards toxic toxicity nsfw violation violations flagged rating ratings verdict verdicts".split()
)
_ABOUT_LABELS = frozenset("is type id ids name names main sub class score".split())
_PICTURE_SUFFIXES = frozenset(
    ".jpg .jpeg .png .webp .gif .bmp .tif .tiff .heic .avif .mp4 .webm .mov .wav .mp3".split()
)


def other_fields(
    record: Mapping[str, Any], used: Collection[str], has_images: bool, where: str = "the record"
) -> dict[str, Any]:
    """The fields that are not in `used` and not empty.

    Args:
        has_images (`bool`): Whether the row has a picture. One without may not name a file or an id of one, either.
        where (`str`, *optional*): What the fields belong to, in the error.

    Raises:
        `DataError`: One of them carries a picture, a turn or a label.
    """
    rest = {name: value for name, value in record.items() if name not in used and not is_empty(value)}
    for name, value in rest.items():
        kind = _carried(str(name), value, has_images)
        if kind is not None:
            raise DataError(
                f"{where} has the field `{name}` ({short(value)}), which looks like {kind} and would be lost: "
                f"{_FIXES[kind]}. If it is neither picture, turn nor label, put it under `metadata`, or name it "
                "under `metadata` in a taxonomy"
            )
    return rest


_FIXES = {
    "a picture": "name pictures `images`; videos and sounds cannot be read",
    "a turn": "put all turns into `messages` (or `conversations`)",
    "a label": "name labels `category` and `level`, or map them by a taxonomy",
}


def is_empty(value: Any) -> bool:
    """Null, or nothing in it: tables have all fields in all rows."""
    return value is None or (isinstance(value, (str, bytes, list, tuple, dict)) and len(value) == 0)


def _carried(name: str, value: Any, has_images: bool) -> str | None:
    # `imageURL`, `image_2` and `Image-Path` are `image url`, `image` and `image path`.
    spaced = re.sub(r"(?<=[a-z])(?=[A-Z])|[^A-Za-z]+", " ", name)
    words = spaced.lower().split()
    if (
        _holds_picture(value)
        or _consists(words, _PICTURES, _ABOUT_PICTURES)
        or "_".join(words) in ("file_name", "filename")
    ):
        return "a picture"
    if not has_images and (_consists(words, _PICTURES, _ABOUT_PICTURES | {"id", "ids"}) or _names_picture(value)):
        return "a picture"
    if "_".join(words) in _TURNS or _holds_turns(value):
        return "a turn"
    return "a label" if _consists(words, _LABELS, _ABOUT_LABELS) else None


def _consists(words: list[str], kind: frozenset[str], about: frozenset[str]) -> bool:
    """Whether a name speaks of nothing else: `risk_level` is a label, `difficulty_level` something about the row."""
    return not kind.isdisjoint(words) and (kind | about).issuperset(words)


def _holds_picture(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return any(map(_holds_picture, value))
    if isinstance(value, dict):
        return bool(value) and value.keys() <= {"bytes", "path"}
    return isinstance(value, (bytes, Image.Image))


def _names_picture(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return any(map(_names_picture, value))
    return isinstance(value, (str, os.PathLike)) and PurePath(value).suffix.lower() in _PICTURE_SUFFIXES


def _holds_turns(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and any(
        isinstance(turn, dict) and ({"role", "content"} <= turn.keys() or {"from", "value"} <= turn.keys())
        for turn in value
    )
