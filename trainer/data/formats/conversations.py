"""Records with `conversations`: PSA-VLM/SafeVLM rows (`SAFEVLM`) and LLaVA-Instruct (`LLAVA`).

Two differences from the reference loader (method.md, fault 5): a conversation that does not begin with the user is an
error instead of losing its first turn, and the two images of `a<split>b` stay two images instead of being pasted into
one.
"""

from __future__ import annotations

from typing import Any

from safevlm.trainer.data.errors import DataError

from .chat_record import ChatRecord
from .markers import place_images
from .row_format import RowFormat


def _parse_safevlm(record: dict, **options: Any) -> dict[str, Any]:
    """Both labels must be present, even if null. A single marker stands for all images of the row."""
    for field in ("safe_type", "safe_level"):
        if field not in record:
            raise DataError(f"`{field}` is missing; label the row, or write null where the label is unknown")
    return _parse(record, one_marker_for_all=True, **options)


def _parse_llava(record: dict, **options: Any) -> dict[str, Any]:
    return _parse(record, one_marker_for_all=False, **options)


def _parse(record: dict, *, one_marker_for_all: bool, **options: Any) -> dict[str, Any]:
    chat = ChatRecord(record, "conversations", "from", "value", split_image_names=True)
    messages = place_images(chat.text_turns(), len(chat.images), chat.images_field, one_marker_for_all)
    return chat.parts(messages, **options)


def _is_labelled(record: dict) -> bool:
    return "safe_type" in record or "safe_level" in record


SAFEVLM = RowFormat(lambda record: _is_labelled(record) and "messages" not in record, _parse_safevlm)
LLAVA = RowFormat(lambda record: "conversations" in record and not _is_labelled(record), _parse_llava)
