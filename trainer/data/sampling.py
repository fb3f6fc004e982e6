"""Draws rows by seed: the paper's stage-1 mix (supplement, Table 1), and a held-out part that shares no image."""

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
    """Draws the same number of rows of each risk category that occurs, and clean (safe) rows, without replacement.

    The paper's stage 1 has about 11,000 risky rows and 3,000 clean ones, "close to the size of one risk type". The
    number of clean rows trades accuracy of the head against utility.

    Args:
        rows (`Sequence[SafetyRow]`): Labelled rows.
        per_category (`int`, *optional*): Number of rows per risk category. Defaults to the size of the smallest one.
        clean (`int`, *optional*): Number of clean rows. Defaults to `per_category`, or to all if there are fewer.
        seed (`int`, *optional*, defaults to 0): Decides which rows are drawn.
        labels (`SafetyLabels`, *optional*): Their safe category is the clean one.

    Returns:
        `list[SafetyRow]`: In the order of `rows`.

    Raises:
        `DataError`: A row has no category, no row is risky, or there are fewer rows than asked for.
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

    Groups of such rows are stratified by the categories in them. Each stratum contributes about `fraction` of its
    rows; if its groups are too large for that, the next stratum makes up for it.

    Args:
        rows (`Sequence[SafetyRow]`): Rows; unlabelled ones are a stratum of their own.
        fraction (`float`): Size of the held-out part, in (0, 1). How close the result comes depends on the groups.
        seed (`int`, *optional*, defaults to 0): Decides which groups are drawn.
        same_image (`Callable`, *optional*): Maps images that count as the same to the same key. By default only the
            same file does; with `ImageIndex.group`, copies and near duplicates do, too.

    Returns:
        `tuple[list[SafetyRow], list[SafetyRow]]`: The rest and the held-out part, in the order of `rows`.

    Raises:
        `ValueError`: `fraction` is not in (0, 1).
        `DataError`: One of the two parts would be empty.
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
            if len(group) < 2 * wanted:  # taking it comes closer to what is wanted than leaving it
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
