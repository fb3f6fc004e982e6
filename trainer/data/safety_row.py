"""A data row: images, a conversation in the Hub chat format, and the two safety labels.

All readers produce `SafetyRow`s, and everything after them reads nothing else. A row is checked when it is made, so
every `SafetyRow` is well-formed; nothing downstream checks again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from numbers import Integral
from typing import Any

from PIL import Image

from safevlm.safety_labels import PAPER_LABELS, SafetyLabels

from .errors import DataError, short
from .images import MAX_PIXELS, ImageSource, load_image

NOTHING_TO_TRAIN_ON = "has neither an answer nor a label; add one, or drop the row"


@dataclass(frozen=True)
class SafetyRow:
    """One row.

    Args:
        row_id (`str`): Identifies the row in errors and reports. It comes from the file, so it may not be unique.
        images (`tuple` of paths, `bytes` or `PIL.Image.Image`): One for each `{"type": "image"}` part, in order. Paths
            stay paths until `load_images`.
        messages (`list[dict]`): Turns `{"role", "content"}`: an optional `system` first, then `user` and `assistant`
            in turn. `content` is a list of `{"type": "image"}` (user turns only) and `{"type": "text", "text": str}`.
            Parts have no other keys: a chat template would itself fetch a `"url"` or `"path"`.
        category (`int`, *optional*): Index of the risk category; `None` if unknown.
        level (`int`, *optional*): Index of the risk level; `None` if unknown.
        source (`str`, *optional*, defaults to `""`): The data set the row comes from.
        split (`str`, *optional*, defaults to `""`): The split as published (`"train"`, `"test"`, ...).
        question_dependent (`bool`, *optional*): Whether the risk lies in the question about this image (the image is
            harmless with another question) rather than in the image itself; `None` if unknown.
        metadata (`dict`, *optional*): The record's other fields, for people and reports; not used in training.

    Raises:
        `DataError`: A field breaks one of these rules.
    """

    row_id: str
    images: tuple[ImageSource, ...]
    messages: list[dict[str, Any]]
    category: int | None = None
    level: int | None = None
    source: str = ""
    split: str = ""
    question_dependent: bool | None = None
    metadata: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "images", tuple(self.images))
        try:
            _check_messages(self.messages, len(self.images))
            for name in ("category", "level"):
                value = getattr(self, name)
                if value is not None and (type(value) is not int or value < 0):
                    raise DataError(f"`{name}` must be a label index or None, got {short(value)}")
        except DataError as error:
            raise DataError(f"row {self.row_id!r}: {error}.") from None

    @property
    def is_labelled(self) -> bool:
        """Whether the row has a label, which trains the safety head."""
        return self.category is not None or self.level is not None

    @property
    def has_answer(self) -> bool:
        """Whether the row ends with an answer, which trains the language model."""
        return self.messages[-1]["role"] == "assistant"

    @property
    def is_trainable(self) -> bool:
        """Whether the row trains anything: the language model, the safety head, or both."""
        return self.has_answer or self.is_labelled

    def load_images(self, max_pixels: int = MAX_PIXELS) -> list[Image.Image]:
        """Decodes the images to RGB, in order.

        Raises:
            `ImageError`: An image cannot be loaded; the error names this row.
        """
        return [load_image(image, max_pixels=max_pixels, row_id=self.row_id) for image in self.images]


def label_ids(category: Any, level: Any, labels: SafetyLabels = PAPER_LABELS) -> tuple[int | None, int | None]:
    """Turns labels given as indices or names into indices, and checks that the pair is consistent. `None` is unknown.

    The safe category with a level above the first is a contradiction. A risky category with the first level is not:
    the reference data has such rows, e.g. a "misleading" question asked with the right picture.

    Raises:
        `DataError`: An unknown label, a wrong type or a contradiction.
    """
    category, level = plain_label(category), plain_label(level)
    category_id = None if category is None else _label_id("category", category, labels.category_names)
    level_id = None if level is None else _label_id("level", level, labels.level_names)
    if category_id == labels.safe_category_id and (level_id or 0) > 0:
        raise DataError(
            f"category {labels.safe_category!r} contradicts level {labels.level_names[level_id]!r} ({level_id}); "
            f"a safe row has level {labels.level_names[0]!r} (0)"
        )
    return category_id, level_id


def plain_label(value: Any) -> Any:
    """A label as a plain Python value: from a scalar tensor or array, or a float of a column with gaps (2.0, NaN)."""
    if getattr(value, "ndim", None) == 0:
        value = value.item()
    if isinstance(value, float) and (value != value or value.is_integer()):
        return None if value != value else int(value)
    return value


def _label_id(field: str, value: Any, names: Sequence[str]) -> int:
    if isinstance(value, Integral) and not isinstance(value, bool) and 0 <= value < len(names):
        return int(value)  # includes NumPy's integers
    if isinstance(value, str) and value in names:
        return list(names).index(value)
    known = ", ".join(f"{index} {name}" for index, name in enumerate(names))
    raise DataError(f"unknown {field} {short(value)}; use the integer or the name of one of: {known}")


def _check_messages(messages: Any, num_images: int) -> None:
    if not isinstance(messages, list) or not messages:
        raise DataError(f"`messages` must be a non-empty list of turns, got {short(messages)}")
    turns = [_check_turn(turn, number) for number, turn in enumerate(messages, start=1)]
    roles = turns[1:] if turns[0] == "system" else turns
    for number, role in enumerate(roles):
        expected = ("user", "assistant")[number % 2]
        if role != expected:
            where = f"turn {number + 1 + len(turns) - len(roles)}"
            raise DataError(f"{where} is from {role!r}, expected {expected!r}; user and assistant alternate")
    if not roles:
        raise DataError("the conversation has no user turn")
    parts = sum(part["type"] == "image" for turn in messages for part in turn["content"])
    if parts != num_images:
        raise DataError(f"{num_images} image(s) but {parts} image part(s) in the conversation; they must agree")


def _check_turn(turn: Any, number: int) -> str:
    where = f"turn {number}"
    if not isinstance(turn, dict) or turn.keys() != {"role", "content"}:
        raise DataError(f"{where} must have exactly the keys 'role' and 'content', got {short(turn)}")
    role, content = turn["role"], turn["content"]
    if role not in ("system", "user", "assistant"):
        raise DataError(f"{where} has the role {short(role)}, expected system, user or assistant")
    if not isinstance(content, list):
        raise DataError(f"{where}: `content` must be a list of parts, got {short(content)}")
    has_content = False
    for part in content:
        if part == {"type": "image"} and role == "user":
            has_content = True
        elif isinstance(part, dict) and part.keys() == {"type", "text"} and part["type"] == "text":
            has_content |= bool(check_text(part["text"], where).strip())
        else:
            raise DataError(
                f"{where} ({role}) has the part {short(part)}; allowed are {{'type': 'text', 'text': …}} and, "
                "in user turns, {'type': 'image'} without other keys"
            )
    if not has_content:
        raise DataError(f"{where} ({role}) is empty; give it a text or drop the row")
    return role


def check_text(text: Any, where: str) -> str:
    """Returns `text` if it is a `str` that tokenizers accept.

    Raises:
        `DataError`: It is not a `str`, or holds half a surrogate pair, which JSON can spell but UTF-8 cannot.
    """
    if not isinstance(text, str):
        raise DataError(f"{where}: text must be a string, got {short(text)}")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise DataError(f"{where}: text {short(text)} is not valid Unicode; fix its encoding") from None
    return text
