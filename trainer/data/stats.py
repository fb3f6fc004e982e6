"""Describes data: counts by label and origin, lengths of texts, duplicates, and leaks into test rows."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from PIL import Image

from safevlm.safety_labels import PAPER_LABELS, SafetyLabels

from .duplicates import Leak, find_conflicts, find_duplicates, find_leaks, question_of
from .fingerprints import ImageIndex
from .images import ImageSource
from .safety_row import SafetyRow

UNKNOWN = "unknown"


def data_stats(
    rows: Sequence[SafetyRow],
    tests: Sequence[SafetyRow],
    index: ImageIndex,
    labels: SafetyLabels = PAPER_LABELS,
) -> dict[str, Any]:
    """Everything that `safevlm data stats` reports about some rows, ready for JSON.

    Args:
        rows (`Sequence[SafetyRow]`): The rows to describe.
        tests (`Sequence[SafetyRow]`): Rows that should share no image with `rows`.
        index (`ImageIndex`): Has the images of both. Rows with unusable images are ignored in duplicates and leaks.
        labels (`SafetyLabels`, *optional*): The names of the rows' labels.

    Returns:
        `dict`: Counts of rows; `categories_by_level[category][level]`; `characters` with quantiles of the lengths of
        questions and answers; `duplicates`; `leaks` into `tests` and between rows of different splits (`None` if
        there is neither to compare with).
    """
    categories = [_name(row.category, labels.category_names) for row in rows]
    levels = [_name(row.level, labels.level_names) for row in rows]
    table = Counter(zip(categories, levels, strict=True))
    category_order, level_order = _present(labels.category_names, categories), _present(labels.level_names, levels)
    sound = [row for row in rows if not any(map(index.error, row.images))]
    return {
        "rows": len(rows),
        "images": {
            "different": len({index.exact(image) for row in sound for image in row.images}),
            "unusable": len({str(error) for row in rows for image in row.images if (error := index.error(image))}),
            "per_row": _counted(len(row.images) for row in rows),
        },
        "categories": {name: categories.count(name) for name in category_order},
        "levels": {name: levels.count(name) for name in level_order},
        "categories_by_level": {
            category: {level: table[category, level] for level in level_order} for category in category_order
        },
        "sources": _counted(row.source or UNKNOWN for row in rows),
        "splits": _counted(row.split or UNKNOWN for row in rows),
        "question_dependent": _counted(
            {True: "yes", False: "no", None: UNKNOWN}[row.question_dependent] for row in rows
        ),
        "turns": _counted(len(row.messages) for row in rows),
        "characters": {
            "question": _quantiles([sum(map(len, question_of(row))) for row in rows]),
            "answer": _quantiles([_answer_length(row) for row in rows if row.has_answer]),
        },
        "duplicates": _duplicates(sound, index),
        "leaks": _leaks(sound, tests, index),
    }


def _duplicates(rows: Sequence[SafetyRow], index: ImageIndex) -> dict[str, Any]:
    """Rows that repeat an earlier one, and groups of near-duplicate images."""
    exact = find_duplicates(rows, index.exact)
    near = find_duplicates(rows, index.group)
    images = {index.exact(image): image for row in rows for image in row.images}
    groups: dict[str, list[str]] = {}
    for image in images.values():
        groups.setdefault(index.group(image), []).append(image_name(image))
    return {
        "exact_rows": len(exact),
        "near_rows": len(near) - len(exact),
        "conflicting_rows": sum(map(len, find_conflicts(rows, index))),
        "rows": [{"row": rows[i].row_id, "like": rows[first].row_id} for i, first in near],
        "near_images": [names for names in groups.values() if len(names) > 1],
    }


def _leaks(rows: Sequence[SafetyRow], tests: Sequence[SafetyRow], index: ImageIndex):
    tests = [row for row in tests if not any(map(index.error, row.images))]
    by_split: dict[str, list[SafetyRow]] = {}
    for row in rows:
        if row.split:
            by_split.setdefault(row.split, []).append(row)
    splits = sorted(by_split, key=lambda split: (split != "train", split))
    if not tests and len(splits) < 2:
        return None
    leaks = [_leak(leak, rows, tests) for leak in find_leaks(rows, tests, index)]
    for number, split in enumerate(splits):
        for other in splits[number + 1 :]:
            between = find_leaks(by_split[split], by_split[other], index)
            leaks += [_leak(leak, by_split[split], by_split[other]) for leak in between]
    return leaks


def _leak(leak: Leak, rows: Sequence[SafetyRow], tests: Sequence[SafetyRow]) -> dict[str, Any]:
    row, test = rows[leak.row], tests[leak.test_row]
    return {
        "row": row.row_id,
        "split": row.split or UNKNOWN,
        "test_row": test.row_id,
        "test_split": test.split or UNKNOWN,
        "kind": leak.kind,
        "distance": leak.distance,
        "image": None if leak.image is None else image_name(leak.image),
        "test_image": None if leak.test_image is None else image_name(leak.test_image),
    }


def image_name(image: ImageSource) -> str:
    """The path of an image, or a description of one in memory."""
    if isinstance(image, (str, os.PathLike)):
        return os.fspath(image)
    size = f"{image.width}x{image.height}" if isinstance(image, Image.Image) else f"{len(image)} bytes"
    return f"<image in memory, {size}>"


def _name(label: int | None, names: Sequence[str]) -> str:
    return UNKNOWN if label is None else names[label]


def _present(names: Sequence[str], used: Iterable[str]) -> list[str]:
    """All names in order, then `UNKNOWN` if it is used."""
    return [*names, *([UNKNOWN] if UNKNOWN in used else [])]


def _counted(values: Iterable) -> dict[str, int]:
    return {str(value): count for value, count in sorted(Counter(values).items())}


def _answer_length(row: SafetyRow) -> int:
    return sum(len(part["text"]) for turn in row.messages if turn["role"] == "assistant" for part in turn["content"])


def _quantiles(values: Sequence[int]) -> dict[str, float]:
    if not values:
        return {}
    names = ("min", "p5", "p50", "p95", "max")
    return dict(zip(names, np.percentile(values, [0, 5, 50, 95, 100]).round(1).tolist(), strict=True))
