"""The picture sheet: pictures and questions, the answers of base and safe model, and the verdicts as bars."""

import textwrap
from pathlib import Path

from .evaluation import Record
from .picture_world.examples import LEVEL_NAMES

KINDS = ("clean", "lookalike", "risky_sounding", "risky", "pair_benign", "pair_risky")
TITLES = {
    "clean": "ordinary question, clean picture",
    "lookalike": "harmless look-alike signs",
    "risky_sounding": "risky-sounding question, clean picture",
    "risky": "risky request, risky picture",
    "pair_benign": "pair: ordinary question ...",
    "pair_risky": "... and a risky one, same picture",
}
LEVEL_COLOURS = ("#4c9a5b", "#e5b93c", "#e07b39", "#b5332e")


def choose(records: list[Record], rows: int = 3) -> list[int]:
    """Indices of the records to show, row by row: one of each kind, levels in turn, and pairs side by side."""
    chosen: list[int] = []
    pairs = {r.example.pair_id: {} for r in records if r.example.pair_id is not None}
    for i, record in enumerate(records):
        if record.example.pair_id is not None:
            pairs[record.example.pair_id][record.example.kind] = i
    shown_pairs = [
        next(pair for pair in pairs.values() if records[pair["pair_risky"]].example.level == 1 + row % 3)
        for row in range(rows)
    ]
    for row in range(rows):
        for kind in KINDS:
            if kind.startswith("pair"):
                chosen.append(shown_pairs[row][kind])
                continue
            candidates = [
                i
                for i, r in enumerate(records)
                if r.example.kind == kind and (kind != "risky" or r.example.level == 1 + row % 3)
            ]
            chosen.append(candidates[row % len(candidates)])
    return chosen


def draw_sheet(answers: dict[str, list[Record]], path: str | Path, rows: int = 3):
    """
    Writes the sheet as a PNG file.

    Args:
        answers (`dict`): The records of `"base"` and `"stage2"`, in the same order.
    """
    make_sheet(answers, rows).savefig(path, dpi=110, bbox_inches="tight")


def make_sheet(answers: dict[str, list[Record]], rows: int = 3):
    """The sheet as a figure."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    base, safe = answers["base"], answers["stage2"]
    chosen = choose(safe, rows)
    figure = Figure(figsize=(3.1 * len(KINDS), 5.4 * rows))
    FigureCanvasAgg(figure)  # without pyplot, which has global state and may need a display
    ratios = {"height_ratios": [3, 3.3] * rows, "hspace": 0.12, "wspace": 0.18}
    grid = figure.subplots(2 * rows, len(KINDS), gridspec_kw=ratios)
    for place, index in enumerate(chosen):
        row, column = divmod(place, len(KINDS))
        record = safe[index]
        picture, text = grid[2 * row][column], grid[2 * row + 1][column]
        picture.imshow(record.example.image, interpolation="nearest")
        if row == 0:
            picture.set_title(TITLES[record.example.kind], fontsize=8.5, fontweight="bold")
        picture.set_xticks([])
        picture.set_yticks([])
        text.axis("off")
        _write(text, record, base[index])
    figure.suptitle("SafeVLM on the picture world: held-out pictures", fontsize=13, y=0.895 + 0.06 / rows)
    return figure


def _write(axis, record: Record, base: Record):
    def wrap(text):
        return "\n".join(textwrap.wrap(text, 40)) or "(no answer)"

    y = 1.0
    for label, value, colour in (
        ("asked", record.example.question, "#222222"),
        ("base", base.answer, "#8a2f2b" if base.answer.startswith("Sure.") else "#555555"),
        ("safe", record.answer, "#14532d"),
    ):
        text = wrap(f"{label}: {value}")
        axis.text(0, y, text, va="top", fontsize=7.6, color=colour, family="DejaVu Sans", transform=axis.transAxes)
        y -= 0.075 * (text.count("\n") + 1) + 0.025
    verdict = record.verdict
    words = f"{verdict['action']} | {verdict['category']} | {verdict['level']}"
    axis.text(0, 0.29, words, va="top", fontsize=7.4, fontweight="bold", transform=axis.transAxes)
    left = 0.0
    for name, colour in zip(LEVEL_NAMES, LEVEL_COLOURS, strict=True):
        share = verdict["level_probabilities"][name]
        axis.barh(0.16, share, left=left, height=0.06, color=colour)
        left += share
    axis.set(xlim=(0, 1), ylim=(0, 1))
    legend = "risk: none / low / medium / high"
    axis.text(1, 0.11, legend, ha="right", va="top", fontsize=5.8, color="#777777", transform=axis.transAxes)
