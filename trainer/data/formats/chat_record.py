"""What the chat-like formats share: turns and speakers, images, labels, a system prompt beside the turns, metadata."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from safevlm.safety_labels import SafetyLabels
from safevlm.trainer.data.errors import DataError, short
from safevlm.trainer.data.safety_row import check_text, label_ids, plain_label

from .fields import image_list, is_empty, optional_text
from .markers import IMAGE_SEPARATOR
from .row_format import Context
from .unused_fields import unused_fields

_ROLES = {"user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant", "system": "system"}
_CATEGORY_FIELDS = ("safe_type", "category")  # the reference data's name and the plain one
_LEVEL_FIELDS = ("safe_level", "level")
_COMMON_FIELDS = (
    *("id", "image", "images", "system", "system_prompt"),
    *("source", "split", "question_dependent", "metadata"),  # written by `write_safevlm_jsonl`
)


class ChatRecord:
    """
    A chat-like record while it is read.

    Args:
        record (`dict`): The record.
        turns_field (`str`): The field that holds the turns.
        role_key, text_key (`str`): The keys of a turn that hold its speaker and its content.
        split_image_names (`bool`): Whether `a<split>b` in the image field names two images.

    Attributes:
        images (`list`): As the record holds them.
        images_field (`str`): The field that has them: `image` or `images`.
    """

    def __init__(
        self, record: dict, turns_field: str, role_key: str, text_key: str, split_image_names: bool = False
    ) -> None:
        self.record, self.turns_field, self.role_key, self.text_key = record, turns_field, role_key, text_key
        self.images_field = "image" if is_empty(record.get("images")) else "images"
        self.images = self._read_images(split_image_names)
        self._turn_metadata: dict[str, Any] = {}

    def _read_images(self, split_names: bool) -> list[Any]:
        field, record = self.images_field, self.record
        value = record.get(field)
        if split_names and isinstance(value, str):
            value = value.split(IMAGE_SEPARATOR)
        images = image_list(value, field)
        if field == "images" and not is_empty(record.get("image")) and image_list(record["image"]) != images:
            raise DataError("images are both in `image` and in `images`, and not the same; keep one of the two")
        return images

    def turns(self) -> list[tuple[str, Any]]:
        """Role and content of each turn."""
        turns = self.record.get(self.turns_field)
        if not isinstance(turns, (list, tuple)) or not turns:
            raise DataError(f"`{self.turns_field}` must be a non-empty list of turns, got {short(turns)}")
        return [self._turn(turn, number) for number, turn in enumerate(turns, start=1)]

    def text_turns(self) -> list[tuple[str, str]]:
        """Role and text of each turn; any other content is an error."""
        return [
            (role, check_text(text, f"{self.place(number)}, `{self.text_key}`"))
            for number, (role, text) in enumerate(self.turns(), start=1)
        ]

    def place(self, number: int) -> str:
        """What errors call a turn."""
        return f"`{self.turns_field}` turn {number}"

    def keep_unused(self, part: dict, used: set[str], number: int, what: str = "") -> None:
        """Keeps the other fields of a turn, or of `what` in it, such as a speaker's name, as metadata of the row."""
        if rest := unused_fields(part, used, has_images=True, where=self.place(number) + what):
            self._turn_metadata.setdefault(f"turn {number}", {}).update(rest)

    def parts(
        self, messages: list[dict[str, Any]], *, labels: SafetyLabels, assume_safe: bool, context: Context, **_: Any
    ) -> dict[str, Any]:
        """The parts of the row, see `RowFormat`, given its messages."""
        record, used = self.record, {*_COMMON_FIELDS, self.turns_field}
        dependent = record.get("question_dependent")
        if dependent is not None and type(dependent) is not bool:
            raise DataError(f"`question_dependent` must be true, false or null, got {short(dependent)}")
        if context.taxonomy is None:
            used.update(_CATEGORY_FIELDS, _LEVEL_FIELDS)
            category, level = self._labels(labels)
            if assume_safe and category is None and level is None:
                category, level = labels.safe_category_id, 0
            labelled = {"category": category, "level": level}
        else:
            labelled = {"facts": {**record, **context.facts}}
        return {
            "images": self.images,
            "messages": self._with_system_prompt(messages),
            "question_dependent": dependent,
            **{name: optional_text(record, name) or "" for name in ("source", "split")},
            **labelled,
            "metadata": self._metadata(),
            "used": used,
        }

    def _turn(self, turn: Any, number: int) -> tuple[str, Any]:
        where, role_key, text_key = self.place(number), self.role_key, self.text_key
        if not isinstance(turn, dict) or role_key not in turn or text_key not in turn:
            raise DataError(f"{where} must be an object with {role_key!r} and {text_key!r}, got {short(turn)}")
        speaker = turn[role_key]
        role = _ROLES.get(speaker.lower()) if isinstance(speaker, str) else None
        if role is None:
            raise DataError(f"{where}: `{role_key}` must be one of {sorted(_ROLES)} in any case, got {short(speaker)}")
        self.keep_unused(turn, {role_key, text_key}, number)
        return role, turn[text_key]

    def _labels(self, labels: SafetyLabels) -> tuple[int | None, int | None]:
        category = self._label(_CATEGORY_FIELDS, lambda value: label_ids(value, None, labels)[0])
        level = self._label(_LEVEL_FIELDS, lambda value: label_ids(None, value, labels)[1])
        return label_ids(category, level, labels)

    def _label(self, names: Sequence[str], label_id: Callable[[Any], int | None]) -> int | None:
        """The label in one of the fields `names`, or in several that agree."""
        values = {name: self.record[name] for name in names if plain_label(self.record.get(name)) is not None}
        fields = "/".join(f"`{name}`" for name in values)
        try:
            ids = {label_id(value) for value in values.values()}
        except DataError as error:
            raise DataError(f"{fields}: {error}") from None
        if len(ids) > 1:
            raise DataError(f"{fields} differ: {short([*values.values()])}; keep one of them")
        return ids.pop() if ids else None

    def _with_system_prompt(self, messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
        given = [name for name in ("system", "system_prompt") if not is_empty(self.record.get(name))]
        if not given:
            return messages
        places = [f"`{name}`" for name in given] + ["the first turn"] * (messages[0]["role"] == "system")
        if len(places) > 1:
            raise DataError(f"the system prompt is given twice, in {' and '.join(places)}; keep one of them")
        text = check_text(self.record[given[0]], places[0])
        return [{"role": "system", "content": [{"type": "text", "text": text}]}, *messages]

    def _metadata(self) -> dict[str, Any]:
        given = self.record.get("metadata")
        if given is None:
            return self._turn_metadata
        return {**(given if isinstance(given, dict) else {"metadata": given}), **self._turn_metadata}
