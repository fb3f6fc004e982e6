"""One record as people write it, such as a dict in a list or a row of a `datasets.Dataset`, as a `SafetyExample`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .errors import DataError
from .schema import SafetyExample, label_ids, short


def example_from_record(record: Mapping, labels, row_id: str) -> SafetyExample:
    """
    Args:
        record (`Mapping`): `messages`, `images`, and `safe_type`/`safe_level` or `category`/`level`.
        labels: What has `category_names`, `safe_category` and `level_names`, such as a `SafeVlmConfig`.
        row_id (`str`): Names the row in errors.
    """
    record = {name: value for name, value in record.items() if value is not None}
    category = record.get("category", record.get("safe_type"))
    level = record.get("level", record.get("safe_level"))
    images = record.get("images", [])
    try:
        if "messages" not in record:
            raise DataError(f"it has no `messages`, got the fields {short(sorted(record))}")
        category, level = label_ids(category, level, labels.category_names, labels.level_names)
        messages = [_turn(turn) for turn in record["messages"]]
    except DataError as error:
        raise DataError(f"row {row_id!r}: {error}.") from None
    images = images if isinstance(images, (list, tuple)) else [images]
    return SafetyExample(row_id, [_image(image) for image in images], messages, category, level)


def _turn(turn: Mapping) -> dict[str, Any]:
    content = turn["content"]
    if isinstance(content, str):
        content = [{"type": "text", "text": content}]
    parts = [{name: value for name, value in part.items() if value is not None} for part in content]
    return {"role": turn["role"], "content": parts}


def _image(image):
    if isinstance(image, Mapping):  # of a `datasets.Image` feature
        return image["bytes"] if image.get("bytes") is not None else image["path"]
    return image
