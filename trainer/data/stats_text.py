"""The statistics of data as text: what `safevlm data stats` prints."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .stats import UNKNOWN

SHOWN = 10  # entries printed of each list


def stats_text(stats: dict[str, Any], where_all: str) -> str:
    """
    The report of `safevlm data stats`.

    Args:
        stats (`dict`): What `data_stats` returned, with the entries that the command adds to it.
        where_all (`str`): Tells the reader where the complete lists are.
    """
    sections = [_counts(stats), _duplicates(stats, where_all) + _leaks(stats["leaks"], where_all)]
    return "\n\n".join("\n".join(lines) for lines in sections)


def _counts(stats: dict[str, Any]) -> list[str]:
    images = stats["images"]
    lines = [
        f"{stats['rows']} rows, {len(stats['skipped'])} more that cannot be read; "
        f"{images['different']} different images, {images['unusable']} unusable",
        "",
        *_table(stats["categories_by_level"]),
        "",
    ]
    for title, counts in (
        ("sources", stats["sources"]),
        ("splits", stats["splits"]),
        ("risk in the question", stats["question_dependent"]),
        ("images per row", images["per_row"]),
        ("turns per row", stats["turns"]),
    ):
        lines.append(f"{title}: " + ", ".join(f"{name} {count}" for name, count in counts.items()))
    for kind, lengths in stats["characters"].items():
        if lengths:
            lines.append(
                f"characters of {kind}: median {lengths['p50']:g}, 5-95 % {lengths['p5']:g}-{lengths['p95']:g}, "
                f"{lengths['min']:g} to {lengths['max']:g}"
            )
    return lines


def _table(counts: dict[str, dict[str, int]]) -> list[str]:
    """Categories by levels, with sums."""
    levels = list(next(iter(counts.values())))
    sums = [sum(by_level[level] for by_level in counts.values()) for level in levels]
    lines = [("", [*levels, "all"])]
    lines += [(category, [*by_level.values(), sum(by_level.values())]) for category, by_level in counts.items()]
    lines.append(("all", [*sums, sum(sums)]))
    width, column = max(map(len, [*counts, "all"])), max(7, *map(len, levels)) + 2
    return [f"{name:{width}} " + "".join(f"{cell:>{column}}" for cell in cells) for name, cells in lines]


def _duplicates(stats: dict[str, Any], where_all: str) -> list[str]:
    duplicates = stats["duplicates"]
    repeated = [f"{entry['row']} says the same as {entry['like']}" for entry in duplicates["rows"]]
    near_images = [" ~ ".join(names) for names in duplicates["near_images"]]
    return [
        f"duplicate rows: {duplicates['exact_rows']} exact, {duplicates['near_rows']} near "
        f"(images up to {stats['near_distance']} of 256 bits apart); "
        f"rows with the image and question of another, but other labels: {duplicates['conflicting_rows']}",
        *_shortened(repeated, where_all),
        f"groups of near-duplicate images: {len(near_images)}",
        *_shortened(near_images, where_all),
    ]


def _leaks(leaks: Sequence[dict[str, Any]] | None, where_all: str) -> list[str]:
    if leaks is None:
        return ["leaks into test rows: not looked for; name the test data with --against"]
    return [f"leaks into test rows: {len(leaks)}", *_shortened([_leak(leak) for leak in leaks], where_all)]


def _leak(leak: dict[str, Any]) -> str:
    test = "test" if leak["test_split"] == UNKNOWN else leak["test_split"]
    rows = f"{leak['row']} = {test} row {leak['test_row']}"
    if leak["kind"] == "text":
        return f"{rows} (same question, no image)"
    distance = "" if leak["distance"] is None else f", {leak['distance']} bits"
    test_image = "" if leak["test_image"] == leak["image"] else f" ~ {leak['test_image']}"
    return f"{rows} ({leak['kind']}{distance}): {leak['image']}{test_image}"


def _shortened(lines: list[str], where_all: str) -> list[str]:
    more = [f"  ... and {len(lines) - SHOWN} more; {where_all}"] if len(lines) > SHOWN else []
    return [f"  {line}" for line in lines[:SHOWN]] + more
