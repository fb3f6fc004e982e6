"""The fields of a record that its format does not use: an error if a picture, a turn or a label would be lost.

All others are kept as the row's metadata. Fields are judged by their names and by their values.
"""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Iterator, Mapping
from pathlib import PurePath
from typing import Any

from PIL import Image

from safevlm.trainer.data.errors import DataError, short

from .fields import is_empty


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


# A field whose name consists of these words carries pictures: `image`, `imageURL`, `img_path`, `image_2`.
_PICTURES = _words(
    "image images img imgs picture pictures pic pics photo photos screenshot screenshots frame frames video videos "
    "audio audios media clip clips pixel jpg jpeg png webp gif"
)
_ABOUT_PICTURES = _words(
    "path paths url urls uri file files filename name names bytes base b data list values input"  # base64, b64
)
_PICTURE_SUFFIXES = _words(
    ".jpg .jpeg .png .webp .gif .bmp .tif .tiff .heic .avif .jfif .pgm .ppm .svg .pdf .mp4 .webm .mov .mkv .wav .mp3"
)
# In the same way `history`, `user_prompt` and `model_response` carry turns, or change them.
_TURNS = _words(
    "system prompt prompts query queries question questions instruction instructions input inputs output outputs "
    "history conversation conversations message messages dialog dialogs dialogue dialogues turn turns answer answers "
    "response responses completion completions chosen rejected reply replies tool tools function functions reasoning "
    "thinking thought thoughts cot rationale rationales context target targets truth prefix text user human assistant "
    "gpt bot"
)
_ABOUT_TURNS = _words("content list call calls model safe unsafe harmful reference ground")
# And `is_safe`, `risk_level` and `response_harm_label` are labels.
_LABELS = _words(
    "safe unsafe safety label labels category categories subcategory level levels risk risks risky severity harm "
    "harms harmful harmfulness hazard hazards toxic toxicity nsfw violation violations flagged rating ratings verdict "
    "decision moderation classification policy"
)
_ABOUT_LABELS = _words(
    "is type id ids name names main sub class score final gold image text user model prompt query question answer "
    "response refusal"
)
# Fields that select what is trained on, each with the value that means the same as leaving it out.
_LOSS = {
    "weight": 1,
    "loss": True,
    "loss_weight": 1,
    "train": True,
    "trainable": True,
    "mask": False,
    "loss_mask": True,
}

_FIXES = {
    "a picture": "name pictures `images`; videos and sounds cannot be read",
    "a turn": "put all turns into one list of turns",
    "a loss weight or mask": "drop the row, or end it before that turn; all answers of a row are trained on",
    "a label": "name labels `category` and `level`, or map them by a taxonomy",
}


def unused_fields(
    record: Mapping[str, Any], used: Collection[str], has_images: bool, where: str = "the record"
) -> dict[str, Any]:
    """The fields that are neither in `used` nor empty.

    Args:
        has_images (`bool`): Whether the row has a picture. If not, a picture's file name or id is an error, too.
        where (`str`, *optional*): What the fields belong to, for the error message.

    Raises:
        `DataError`: One of them seems to carry a picture, a turn or a label, or a weight in the loss.
    """
    rest = {name: value for name, value in record.items() if name not in used and not is_empty(value)}
    for name, value in rest.items():
        kind = _carried(str(name), value, has_images)
        if kind is not None:
            raise DataError(
                f"{where} has the field `{name}` ({short(value)}), which looks like {kind} and would be lost: "
                f"{_FIXES[kind]}. If it is something else, put it under `metadata`, or list its name as `metadata` "
                "of a taxonomy"
            )
    return rest


def _carried(name: str, value: Any, has_images: bool) -> str | None:
    if name in _LOSS and value != _LOSS[name]:
        return "a loss weight or mask"
    words = re.sub(r"(?<=[a-z])(?=[A-Z])|[^A-Za-z]+", " ", name).lower().split()
    about_pictures = _ABOUT_PICTURES if has_images else _ABOUT_PICTURES | {"id", "ids"}
    if _consists_of(words, _PICTURES, about_pictures) or "".join(words) == "filename" or _holds_picture(value):
        return "a picture"
    if not has_images and _names_picture(value):
        return "a picture"
    if _consists_of(words, _TURNS, _ABOUT_TURNS) or _holds_turns(value):
        return "a turn"
    return "a label" if _consists_of(words, _LABELS, _ABOUT_LABELS) else None


def _consists_of(words: list[str], kind: frozenset[str], about: frozenset[str]) -> bool:
    """Whether all words of a name fit a kind: `risk_level` is a label, `difficulty_level` is not."""
    return not kind.isdisjoint(words) and (kind | about).issuperset(words)


def _holds_picture(value: Any) -> bool:
    return any(_is_picture(part) for part in _nested_values(value))


def _is_picture(value: Any) -> bool:
    if isinstance(value, dict):
        return bool(value) and value.keys() <= {"bytes", "path"}
    return isinstance(value, (bytes, Image.Image)) or (
        isinstance(value, str) and value[:11].lower().startswith(("data:image/", "data:video/", "data:audio/"))
    )


def _names_picture(value: Any) -> bool:
    """Whether a value is, or contains, the path or URL of a media file, with or without a query."""
    names = [os.fspath(part) for part in _nested_values(value) if isinstance(part, (str, os.PathLike))]
    return any(PurePath(re.split("[?#]", name, maxsplit=1)[0]).suffix.lower() in _PICTURE_SUFFIXES for name in names)


def _nested_values(value: Any) -> Iterator[Any]:
    """A value and everything inside its lists and mappings, at any depth."""
    waiting = [value]
    while waiting:
        value = waiting.pop()
        yield value
        if isinstance(value, (list, tuple, dict)):
            waiting.extend(value.values() if isinstance(value, dict) else value)


def _holds_turns(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and any(
        isinstance(turn, dict) and ({"role", "content"} <= turn.keys() or {"from", "value"} <= turn.keys())
        for turn in value
    )
