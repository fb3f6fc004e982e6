"""Chat-like formats: PSA-VLM/SafeVLM rows, LLaVA-Instruct, LLaMA-Factory's mllm and the Hub's chat format.

They share everything but the spelling of the turns: pictures in `image` or `images`, a system prompt beside the turns,
labels in `safe_type` and `safe_level` or in `category` and `level`, and what `write_safevlm_jsonl` adds.

Differences from the reference loader (method.md, fault 5): a conversation that does not begin with the user is an
error instead of losing its first turn, and the two images of `a<split>b` stay two images instead of being pasted
into one.
"""

from __future__ import annotations

import re
from typing import Any

from safevlm.safety_labels import SafetyLabels
from safevlm.trainer.data.errors import DataError, short
from safevlm.trainer.data.safety_row import check_text, label_ids, plain_label

from .fields import image_list, optional_text
from .row_format import Context, RowFormat
from .unused_fields import is_empty, other_fields

IMAGE_MARKER = "<image>"
IMAGE_SEPARATOR = "<split>"
# One line break belongs to the marker, whatever the system that wrote it; a lone \r before it may end a text.
_MARKER_LINE = re.compile(rf"(?:\r?\n)?({IMAGE_MARKER})(?:\r\n?|\n)?")
# Ours, and what other families and tools write where a picture, a video or a sound goes, and Markdown's pictures.
ANY_MARKER = re.compile(
    r"<img>.*?</img>|<image[ _-]?\d*>|<(?:video|audio|imagehere|im_patch|img)>|\[img\]"
    r"|<\|(?:image|img|video|audio|vision|media)\w*\|>|!\[[^\]\n]*\]\([^)\n]+\)",
    re.IGNORECASE,
)
_ROLES = {"user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant", "system": "system"}
_IMAGE_PARTS = ("image", "image_url")
_IMAGE_KEYS = ("image", "image_url", "path", "url", "value", "bytes")
_LABEL_FIELDS = (("safe_type", "category"), ("safe_level", "level"))  # the reference data's name and the plain one
_OWN_FIELDS = ("id", "image", "images", "system", "system_prompt", "source", "split", "question_dependent", "metadata")


def parse_safevlm(record: dict, **options) -> dict[str, Any]:
    """Both labels must be there, if only as null. One marker stands for all images of the row."""
    for field in ("safe_type", "safe_level"):
        if field not in record:
            raise DataError(f"`{field}` is missing; label the row, or write null where the label is unknown")
    return _parse_conversations(record, one_marker_for_all=True, **options)


def parse_llava(record: dict, **options) -> dict[str, Any]:
    return _parse_conversations(record, one_marker_for_all=False, **options)


def _parse_conversations(record: dict, *, one_marker_for_all: bool, **options) -> dict[str, Any]:
    extras: dict[str, Any] = {}
    turns = _turns(record, "conversations", "from", "value", extras)
    field, images = _images(record, split=True)
    messages = _with_images(turns, len(images), field, one_marker_for_all)
    return _row(record, "conversations", images, messages, extras, **options)


def parse_messages(record: dict, **options) -> dict[str, Any]:
    """LLaMA-Factory's mllm, where `content` is a text with `<image>` in it, or the Hub's chat format, where it is a
    list of parts in one turn at least. Then images may be in the parts themselves, and a text is a text."""
    extras: dict[str, Any] = {}
    field, images = _images(record)
    if list not in _content_types(record):
        turns = _turns(record, "messages", "role", "content", extras)
        messages = _with_images(turns, len(images), field)
    else:
        inline: list[Any] = []
        turns = _turn_list(record, "messages")
        messages = [_chat_turn(turn, number, inline, extras) for number, turn in enumerate(turns, start=1)]
        if images and inline:
            raise DataError(f"images are both in `{field}` and in the messages' parts; keep one of the two")
        images = images or inline
        parts = sum(part["type"] == "image" for turn in messages for part in turn["content"])
        if parts != len(images):
            counts = f"{len(images)} image(s) in `{field}` but {parts} image part(s) in `messages`"
            raise DataError(f"{counts}; they must agree")
    return _row(record, "messages", images, messages, extras, **options)


def _row(
    record: dict,
    turns_field: str,
    images: list[Any],
    messages: list[dict[str, Any]],
    metadata: dict[str, Any],
    *,
    labels: SafetyLabels,
    assume_safe: bool,
    context: Context,
    **_,
) -> dict[str, Any]:
    used = {*_OWN_FIELDS, turns_field}
    dependent = record.get("question_dependent")
    if dependent is not None and type(dependent) is not bool:
        raise DataError(f"`question_dependent` must be true, false or null, got {short(dependent)}")
    own = {name: optional_text(record, name) or "" for name in ("source", "split")}
    row = {"images": images, "messages": _with_system(record, messages), "question_dependent": dependent, **own}
    if context.taxonomy is not None:
        row["facts"] = {**record, **context.facts}
    else:
        used.update(name for names in _LABEL_FIELDS for name in names)
        category, level = _labels(record, labels)
        if assume_safe and category is None and level is None:
            category, level = labels.safe_category_id, 0
        row.update(category=category, level=level)
    given = record.get("metadata")
    if given is not None:
        metadata = {**(given if isinstance(given, dict) else {"metadata": given}), **metadata}
    return {**row, "metadata": metadata, "used": used}


def _labels(record: dict, labels: SafetyLabels) -> tuple[int | None, int | None]:
    found: list[Any] = []
    for names in _LABEL_FIELDS:
        given = [name for name in names if plain_label(record.get(name)) is not None]
        fields = "/".join(f"`{name}`" for name in given)
        try:
            pairs = [(record[name], None) if names == _LABEL_FIELDS[0] else (None, record[name]) for name in given]
            ids = {label_ids(*pair, labels)[len(found)] for pair in pairs}
        except DataError as error:
            raise DataError(f"{fields}: {error}") from None
        if len(ids) > 1:
            raise DataError(f"{fields} differ: {short([record[name] for name in given])}; keep one of them")
        found.append(ids.pop() if ids else None)
    return label_ids(*found, labels)


def _images(record: dict, split: bool = False) -> tuple[str, list[Any]]:
    """The field that has the images, and the images."""
    field = "image" if is_empty(record.get("images")) else "images"
    value = record.get(field)
    if split and isinstance(value, str):
        value = value.split(IMAGE_SEPARATOR)
    images = image_list(value, field)
    if field == "images" and not is_empty(record.get("image")) and image_list(record["image"]) != images:
        raise DataError("images are both in `image` and in `images`, and not the same; keep one of the two")
    return field, images


def _turn_list(record: dict, field: str) -> list:
    turns = record.get(field)
    if not isinstance(turns, (list, tuple)) or not turns:
        raise DataError(f"`{field}` must be a non-empty list of turns, got {short(turns)}")
    return list(turns)


def _turns(record: dict, field: str, role_key: str, text_key: str, extras: dict[str, Any]) -> list[tuple[str, str]]:
    turns = []
    for number, turn in enumerate(_turn_list(record, field), start=1):
        where = f"`{field}` turn {number}"
        role = _role(turn, where, role_key, text_key)
        turns.append((role, check_text(turn[text_key], f"{where}, `{text_key}`")))
        _keep_extras(turn, {role_key, text_key}, where, number, extras)
    return turns


def _role(turn: Any, where: str, role_key: str, text_key: str) -> str:
    if not isinstance(turn, dict) or role_key not in turn or text_key not in turn:
        raise DataError(f"{where} must be an object with {role_key!r} and {text_key!r}, got {short(turn)}")
    speaker = turn[role_key]
    role = _ROLES.get(speaker.lower()) if isinstance(speaker, str) else None
    if role is None:
        raise DataError(f"{where}: `{role_key}` must be one of {sorted(_ROLES)} in any case, got {short(speaker)}")
    return role


def _keep_extras(part: dict, used: set[str], where: str, number: int, extras: dict[str, Any]) -> None:
    """What else a turn has, such as a speaker's name, is metadata of the row."""
    if rest := other_fields(part, used, has_images=True, where=where):
        extras.setdefault(f"turn {number}", {}).update(rest)


def _with_images(
    turns: list[tuple[str, str]], num_images: int, field: str, one_marker_for_all: bool = False
) -> list[dict[str, Any]]:
    """Turns the markers in the user turns into image parts, in place."""
    markers = sum(text.count(IMAGE_MARKER) for role, text in turns if role == "user")
    # Without a marker the image goes first, as in LLaVA.
    copies = max(num_images, 1) if one_marker_for_all and markers <= 1 else 1
    missing = num_images > 0 and markers == 0 and (one_marker_for_all or num_images == 1)
    if not missing and markers * copies != num_images:
        raise DataError(f"{num_images} in `{field}` but {markers} {IMAGE_MARKER} in the user turns; make them agree")

    messages = []
    for number, (role, text) in enumerate(turns, start=1):
        other = ANY_MARKER.search(text.replace(IMAGE_MARKER, "")) if role == "user" else None
        if other:
            raise DataError(
                f"turn {number} (user) has {short(other[0])}, for which there is no picture: write {IMAGE_MARKER} and "
                f"name the picture in `{field}`; videos and sounds cannot be read. If it is meant as a text, write "
                'the row as `messages` with `content` [{"type": "text", "text": ...}]'
            )
        pieces = _MARKER_LINE.split(text) if role == "user" else [text]
        content = []
        if role == "user" and missing:
            content, missing = [{"type": "image"} for _ in range(copies)], False
        for piece in pieces:
            if piece == IMAGE_MARKER and role == "user":
                content += [{"type": "image"} for _ in range(copies)]
            elif piece.strip():
                content.append({"type": "text", "text": piece})
        messages.append({"role": role, "content": content})
    return messages


def _with_system(record: dict, messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    given = [name for name in ("system", "system_prompt") if not is_empty(record.get(name))]
    if not given:
        return messages
    if len(given) > 1 or messages[0]["role"] == "system":
        places = [*(f"`{name}`" for name in given), *(["the first turn"] if messages[0]["role"] == "system" else [])]
        raise DataError(f"the system prompt is given twice, in {' and '.join(places)}; keep one of them")
    text = check_text(record[given[0]], f"`{given[0]}`")
    return [{"role": "system", "content": [{"type": "text", "text": text}]}, *messages]


def _chat_turn(turn: Any, number: int, inline: list[Any], extras: dict[str, Any]) -> dict[str, Any]:
    where = f"`messages` turn {number}"
    role = _role(turn, where, "role", "content")
    _keep_extras(turn, {"role", "content"}, where, number, extras)
    content = turn["content"]
    if isinstance(content, str):  # usual for the assistant's turns, here it is one text part, marker or not
        content = [{"type": "text", "text": content}]
    if not isinstance(content, list):
        raise DataError(f"{where}: `content` must be a text or a list of parts, got {short(content)}")
    return {"role": role, "content": [_chat_part(part, where, number, inline, extras) for part in content]}


def _chat_part(part: Any, where: str, number: int, inline: list[Any], extras: dict[str, Any]) -> dict[str, Any]:
    """One part without the image it may carry, which goes to `inline`. Tables fill keys it lacks with null."""
    kind = part.get("type") if isinstance(part, dict) else None
    if kind == "text":
        if part.get("text") is not None and part.get("value") is not None:
            raise DataError(f"{where}: a text part has the text twice, in `text` and `value`; keep one of them")
        field = "text" if part.get("text") is not None else "value"
        _keep_extras(part, {"type", field}, f"{where}: text part", number, extras)
        return {"type": "text", "text": check_text(part.get(field), where)}
    if kind in _IMAGE_PARTS:
        carried = [key for key in _IMAGE_KEYS if part.get(key) is not None]
        if len(carried) > 1:
            raise DataError(f"{where}: an image part has the image more than once, in {carried}; keep one of them")
        _keep_extras(part, {"type", *carried}, f"{where}: image part", number, extras)
        for key in carried:
            image = part[key]
            if isinstance(image, dict) and "url" in image:  # OpenAI's form
                _keep_extras(image, {"url"}, f"{where}: image part", number, extras)
                image = image["url"]
            inline += image_list([image], f"{where}: image part")
        return {"type": "image"}
    raise DataError(f"{where} has the part {short(part)}; only text and image parts can be read")


def _content_types(record: dict) -> set[type]:
    turns = record.get("messages")
    return (
        {type(turn.get("content")) for turn in turns if isinstance(turn, dict)}
        if isinstance(turns, (list, tuple))
        else set()
    )


def _labelled(record: dict) -> bool:
    return "safe_type" in record or "safe_level" in record


SAFEVLM = RowFormat(lambda record: _labelled(record) and "messages" not in record, parse_safevlm)
LLAVA = RowFormat(lambda record: "conversations" in record and not _labelled(record), parse_llava)
MLLM = RowFormat(lambda record: "messages" in record and list not in _content_types(record), parse_messages)
CHAT = RowFormat(lambda record: list in _content_types(record), parse_messages)
