"""Choosing rows, by seed: the paper's stage-1 mix (supplement, Table 1) and a held-out part that shares no image."""

from __future__ import annotations

import logging
import random
from collections import defaultdict
from collections.abc import Callable, Sequence

from safevlm.safety_labels import PAPER_LABELS, SafetyLabels

from .errors import DataError
from .images import ImageSource, image_key
from .safety_row import SafetyRow

logger = logging.getLogger(__name__)


def balance(
    rows: Sequence[SafetyRow],
    *,
    per_category: int | None = None,
    clean: int | None = None,
    seed: int = 0,
    labels: SafetyLabels = PAPER_LABELS,
) -> list[SafetyRow]:
    """The same number of rows of each risk category present, plus clean (safe) rows, sampled without repeats.

    The paper's stage 1 has about 11,000 risky rows and 3,000 clean ones, "close to the size of one risk type"; the
    count of clean rows trades head accuracy against utility.

    Args:
        rows (`Sequence[SafetyRow]`): Labelled rows.
        per_category (`int`, *optional*): Rows per risk category. Defaults to the size of the smallest one.
        clean (`int`, *optional*): Clean rows. Defaults to `per_category`, or all where there are fewer.
        seed (`int`, *optional*, defaults to 0): Which rows are drawn.
        labels (`SafetyLabels`, *optional*): Says which category is the clean one.

    Returns:
        `list[SafetyRow]` in the order of `rows`.

    Raises:
        `DataError`: A row without category, no risky row, or fewer rows than asked for.
    """
    safe, category_names = labels.safe_category_id, labels.category_names
    by_category: dict[int, list[int]] = defaultdict(list)
    for index, row in enumerate(rows):
        if row.category is None or row.category >= len(category_names):
            raise DataError(
                f"row {row.row_id!r}: `category` is {row.category}, balancing needs 0 to {len(category_names) - 1}; "
                "label the row, or read clean data with `assume_safe=True`."
            )
        by_category[row.category].append(index)
    safe_rows = by_category.pop(safe, [])
    if not by_category:
        raise DataError(f"no risky row among {len(rows)}; there is nothing to balance.")
    if per_category is None:
        per_category = min(map(len, by_category.values()))
    if clean is None:
        clean = min(per_category, len(safe_rows))

    draw = random.Random(seed)
    chosen = []
    for category, indices in [*sorted(by_category.items()), (safe, safe_rows)]:
        count = clean if category == safe else per_category
        if not 0 <= count <= len(indices):
            raise DataError(
                f"asked for {count} rows of category {category_names[category]!r}, which has {len(indices)}; "
                f"lower `{'clean' if category == safe else 'per_category'}` or add rows."
            )
        chosen += draw.sample(indices, count)
    logger.info("chose %d of %d rows: %d per risk category, %d clean", len(chosen), len(rows), per_category, clean)
    return [rows[index] for index in sorted(chosen)]


def split_holdout(
    rows: Sequence[SafetyRow],
    fraction: float,
    seed: int = 0,
    same_image: Callable[[ImageSource], str] = image_key,
) -> tuple[list[SafetyRow], list[SafetyRow]]:
    """Splits off a held-out part; rows that share an image, directly or through other rows, stay on the same side.

    Strata are the sets of categories that such groups hold; each gives about `fraction` of its rows, and what one
    cannot give (its groups are too large) the next makes up for.

    Args:
        rows (`Sequence[SafetyRow]`): Rows; unlabelled ones are a stratum of their own.
        fraction (`float`): Wanted size of the held-out part, in (0, 1). The groups decide how near the result is.
        seed (`int`, *optional*, defaults to 0): Which groups are drawn.
        same_image (`Callable`, *optional*): Gives two images that count as one the same key. By default only the same
            file is; `ImageIndex.group` finds copies and near duplicates, too.

    Returns:
        `tuple[list[SafetyRow], list[SafetyRow]]`: The rest and the held-out part, in the order of `rows`.

    Raises:
        `ValueError`: `fraction` is not in (0, 1).
        `DataError`: One of the parts would be empty.
    """
    if not 0 < fraction < 1:
        raise ValueError(f"`fraction` must be between 0 and 1, both excluded, got {fraction!r}.")
    groups = _groups_by_image(rows, same_image)
    strata: dict[tuple[int, ...], list[list[int]]] = defaultdict(list)
    for group in groups:
        categories = {-1 if rows[index].category is None else rows[index].category for index in group}
        strata[tuple(sorted(categories))].append(group)

    draw = random.Random(seed)
    held_out: set[int] = set()
    wanted = 0.0
    for _, stratum in sorted(strata.items()):
        draw.shuffle(stratum)
        wanted += fraction * sum(map(len, stratum))
        for group in stratum:
            if len(group) < 2 * wanted:  # taking it leaves less open than leaving it
                held_out.update(group)
                wanted -= len(group)
    if not 0 < len(held_out) < len(rows):
        raise DataError(
            f"cannot hold out {fraction:.0%} of {len(rows)} rows, which form {len(groups)} group(s) sharing images; "
            "use another `fraction` or more rows."
        )
    rest = [row for index, row in enumerate(rows) if index not in held_out]
    return rest, [rows[index] for index in sorted(held_out)]


def _groups_by_image(rows: Sequence[SafetyRow], same_image: Callable[[ImageSource], str]) -> list[list[int]]:
    """Connected components of "shares an image", as lists of row indices (union-find)."""
    parent = list(range(len(rows)))

    def root(index: int) -> int:
        while parent[index] != index:
            parent[index] = parent[parent[index]]
            index = parent[index]
        return index

    first_with: dict[str, int] = {}
    for index, row in enumerate(rows):
        for image in row.images:
            parent[root(index)] = root(first_with.setdefault(same_image(image), index))
    groups: dict[int, list[int]] = defaultdict(list)
    for index in range(len(rows)):
        groups[root(index)].append(index)
    return list(groups.values())
