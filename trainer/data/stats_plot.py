"""The picture of `safevlm data stats`: labels, sources and text lengths."""

from __future__ import annotations

import os
from typing import Any

import numpy as np

from .stats import UNKNOWN

# From green to red with the level; grey for rows without a label.
_LEVEL_COLOURS = ("#4c9a5b", "#e5b93c", "#e07b39", "#b5332e")
_GREY, _BLUE = "#9a9a9a", "#4a6fa5"
_MOST_SOURCES = 10


def draw_stats(stats: dict[str, Any], path: str | os.PathLike) -> None:
    """Draws what `data_stats` returned into a PNG file.

    Raises:
        `ImportError`: `matplotlib` is not installed.
    """
    try:
        import matplotlib
    except ImportError:
        raise ImportError("the plot needs matplotlib: pip install 'safevlm[data]'") from None
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 3, figsize=(15, 4.6), width_ratios=[5, 3, 3.4], layout="constrained")
    _draw_labels(axes[0], stats["categories_by_level"])
    _draw_counts(axes[1], stats["sources"])
    _draw_lengths(axes[2], stats["characters"])
    for axis in axes:
        axis.spines[["top", "right", "left"]].set_visible(False)
        axis.tick_params(axis="y", length=0)
    figure.get_layout_engine().set(w_pad=0.12)
    duplicates = stats["duplicates"]
    leaks = "not looked for" if stats["leaks"] is None else f"{len(stats['leaks']):,}"
    figure.suptitle(
        f"{stats['rows']:,} rows, {stats['images']['different']:,} images   |   duplicate rows: "
        f"{duplicates['exact_rows']:,} exact, {duplicates['near_rows']:,} near   |   leaks: {leaks}",
        fontsize=12,
    )
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _draw_labels(axis, table: dict[str, dict[str, int]]) -> None:
    names = list(table)[::-1]
    levels = list(next(iter(table.values())))
    known = [level for level in levels if level != UNKNOWN]
    left = np.zeros(len(names))
    for level in levels:
        if level == UNKNOWN:
            colour = _GREY
        else:
            colour = _LEVEL_COLOURS[round(known.index(level) / max(len(known) - 1, 1) * (len(_LEVEL_COLOURS) - 1))]
        counts = np.array([table[name][level] for name in names])
        axis.barh(names, counts, left=left, height=0.66, color=colour, label=level)
        left += counts
    _write_totals(axis, left)
    axis.set_title("rows by category and level", fontsize=11)
    axis.legend(ncols=len(levels), fontsize=9, frameon=False, loc="upper center", bbox_to_anchor=(0.45, -0.08))


def _draw_counts(axis, counts: dict[str, int]) -> None:
    ranked = sorted(counts.items(), key=lambda item: -item[1])
    if len(ranked) > _MOST_SOURCES:
        rest = ranked[_MOST_SOURCES - 1 :]
        ranked = [*ranked[: _MOST_SOURCES - 1], (f"{len(rest)} others", sum(count for _, count in rest))]
    names = [name if len(name) <= 24 else f"{name[:23]}…" for name, _ in ranked]
    axis.barh(range(len(ranked)), [count for _, count in ranked], height=0.66, color=_BLUE)
    axis.set_yticks(range(len(ranked)), names)
    axis.set_ylim(max(len(ranked), 7) - 0.4, -0.6)  # the largest on top, few bars no thicker than many
    _write_totals(axis, [count for _, count in ranked])
    axis.set_title("rows by source", fontsize=11)


def _write_totals(axis, totals) -> None:
    for place, total in enumerate(totals):
        axis.annotate(f"{int(total):,}", (total, place), (4, 0), textcoords="offset points", va="center", fontsize=9)
    axis.margins(x=0.16)
    axis.locator_params(axis="x", integer=True)  # there are no half rows


def _draw_lengths(axis, characters: dict[str, dict[str, float]]) -> None:
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    kinds = [kind for kind in ("question", "answer") if characters[kind]]
    for place, kind in enumerate(kinds):
        lengths = {name: max(value, 1) for name, value in characters[kind].items()}
        axis.plot([lengths["min"], lengths["max"]], [place, place], color=_GREY, linewidth=1.5, marker="|", zorder=1)
        axis.plot([lengths["p5"], lengths["p95"]], [place, place], color=_BLUE, linewidth=12, solid_capstyle="butt")
        axis.plot([lengths["p50"]], [place], "o", color="white", markersize=6)
        axis.annotate(
            f"{lengths['p50']:,.0f}",
            (lengths["p50"], place),
            (0, 11),
            textcoords="offset points",
            ha="center",
            fontsize=9,
        )
    axis.set_xscale("log")
    low, high = axis.get_xlim()
    axis.xaxis.set_major_locator(LogLocator(subs=(1,) if high > 100 * low else (1, 2, 5)))
    axis.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    axis.xaxis.set_minor_formatter(NullFormatter())
    axis.set_yticks(range(len(kinds)), kinds)
    axis.set_ylim(1.7, -0.7)
    axis.set_title("characters (median, 5 to 95 %, all)", fontsize=11)
