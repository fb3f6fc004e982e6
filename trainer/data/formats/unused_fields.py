"""The fields of a record that its format does not use: refused where a picture, a turn or a label would be lost.

Everything else is metadata, which stays with the row. Fields are judged by their names and by what they hold.
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
# Fields that say what to train on, and the value that means no more than to leave them out.
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
    "a say in what is trained": "drop the row, or end it before that turn; all answers of a row are trained on",
    "a label": "name labels `category` and `level`, or map them by a taxonomy",
}


def unused_fields(
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
                f"{_FIXES[kind]}. If it is something else, put it under `metadata`, or list its name as `metadata` "
                "of a taxonomy"
            )
    return rest


def _carried(name: str, value: Any, has_images: bool) -> str | None:
    if name in _LOSS and value != _LOSS[name]:
        return "a say in what is trained"
    words = re.sub(r"(?<=[a-z])(?=[A-Z])|[^A-Za-z]+", " ", name).lower().split()
    about_pictures = _ABOUT_PICTURES if has_images else _ABOUT_PICTURES | {"id", "ids"}
    if _consists(words, _PICTURES, about_pictures) or "".join(words) == "filename" or _holds_picture(value):
        return "a picture"
    if not has_images and _names_picture(value):
        return "a picture"
    if _consists(words, _TURNS, _ABOUT_TURNS) or _holds_turns(value):
        return "a turn"
    return "a label" if _consists(words, _LABELS, _ABOUT_LABELS) else None


def _consists(words: list[str], kind: frozenset[str], about: frozenset[str]) -> bool:
    """Whether a name speaks of nothing else: `risk_level` is a label, `difficulty_level` something about the row."""
    return not kind.isdisjoint(words) and (kind | about).issuperset(words)


def _holds_picture(value: Any) -> bool:
    return any(_is_picture(part) for part in _inside(value))


def _is_picture(value: Any) -> bool:
    if isinstance(value, dict):
        return bool(value) and value.keys() <= {"bytes", "path"}
    return isinstance(value, (bytes, Image.Image)) or (
        isinstance(value, str) and value[:11].lower().startswith(("data:image/", "data:video/", "data:audio/"))
    )


def _names_picture(value: Any) -> bool:
    """A file's name or an address, with or without a query."""
    names = [os.fspath(part) for part in _inside(value) if isinstance(part, (str, os.PathLike))]
    return any(PurePath(re.split("[?#]", n, maxsplit=1)[0]).suffix.lower() in _PICTURE_SUFFIXES for n in names)


def _inside(value: Any) -> Iterator[Any]:
    """A value and all that its lists and mappings hold, however deep."""
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
