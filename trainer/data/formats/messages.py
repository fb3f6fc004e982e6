"""Records with `messages`: LLaMA-Factory's mllm format (`MLLM`) and the Hub's chat format (`CHAT`).

In `MLLM` the `content` of every turn is a text with `<image>` in it. In `CHAT` at least one `content` is a list of
parts. There the images may be in the parts themselves, and a text is a text, whatever markers it spells. The first
record decides the format of a data set, but each record is read as what it is.
"""

from __future__ import annotations

from typing import Any

from safevlm.trainer.data.errors import DataError, short
from safevlm.trainer.data.safety_row import check_text

from .chat_record import ChatRecord
from .fields import image_list
from .markers import place_images
from .row_format import RowFormat

_IMAGE_PARTS = ("image", "image_url")
_IMAGE_KEYS = ("image", "image_url", "path", "url", "value", "bytes")


def _parse(record: dict, **options: Any) -> dict[str, Any]:
    chat = ChatRecord(record, "messages", "role", "content")
    if list in _content_types(record):
        messages = _read_parts(chat)
    else:
        messages = place_images(chat.text_turns(), len(chat.images), chat.images_field)
    return chat.parts(messages, **options)


def _read_parts(chat: ChatRecord) -> list[dict[str, Any]]:
    """The messages; images found in their parts become those of `chat`."""
    messages, inline_images = [], []
    for number, (role, content) in enumerate(chat.turns(), start=1):
        if isinstance(content, str):  # usual in the assistant's turns
            content = [{"type": "text", "text": content}]
        if not isinstance(content, list):
            place = chat.place(number)
            raise DataError(f"{place}: `content` must be a text or a list of parts, got {short(content)}")
        read = [_read_part(chat, part, number) for part in content]
        messages.append({"role": role, "content": [part for part, _ in read]})
        inline_images += [image for _, images in read for image in images]
    if chat.images and inline_images:
        raise DataError(f"images are both in `{chat.images_field}` and in the messages' parts; keep one of the two")
    chat.images = chat.images or inline_images
    num_parts = sum(part["type"] == "image" for turn in messages for part in turn["content"])
    if num_parts != len(chat.images):
        counts = f"{len(chat.images)} image(s) in `{chat.images_field}` but {num_parts} image part(s) in `messages`"
        raise DataError(f"{counts}; they must agree")
    return messages


def _read_part(chat: ChatRecord, part: Any, number: int) -> tuple[dict[str, str], list[Any]]:
    """A part without the images that it may hold, and these. Tables fill the keys that a part lacks with null."""
    kind = part.get("type") if isinstance(part, dict) else None
    if kind == "text":
        return _read_text_part(chat, part, number), []
    if kind in _IMAGE_PARTS:
        return {"type": "image"}, _images_of(chat, part, number)
    raise DataError(f"{chat.place(number)} has the part {short(part)}; only text and image parts can be read")


def _read_text_part(chat: ChatRecord, part: dict, number: int) -> dict[str, str]:
    place = chat.place(number)
    if part.get("text") is not None and part.get("value") is not None:
        raise DataError(f"{place}: a text part has the text twice, in `text` and `value`; keep one of them")
    key = "text" if part.get("text") is not None else "value"
    chat.keep_unused(part, {"type", key}, number, ": text part")
    return {"type": "text", "text": check_text(part.get(key), place)}


def _images_of(chat: ChatRecord, part: dict, number: int) -> list[Any]:
    """The image that an image part holds, if any."""
    place = chat.place(number)
    keys = [key for key in _IMAGE_KEYS if part.get(key) is not None]
    if len(keys) > 1:
        raise DataError(f"{place}: an image part has the image more than once, in {keys}; keep one of them")
    chat.keep_unused(part, {"type", *keys}, number, ": image part")
    if not keys:
        return []
    image = part[keys[0]]
    if isinstance(image, dict) and "url" in image:  # OpenAI's form
        chat.keep_unused(image, {"url"}, number, ": image part")
        image = image["url"]
    return image_list([image], f"{place}: image part")


def _content_types(record: dict) -> set[type]:
    turns = record.get("messages")
    if not isinstance(turns, (list, tuple)):
        return set()
    return {type(turn.get("content")) for turn in turns if isinstance(turn, dict)}


MLLM = RowFormat(lambda record: "messages" in record and list not in _content_types(record), _parse)
CHAT = RowFormat(lambda record: list in _content_types(record), _parse)
