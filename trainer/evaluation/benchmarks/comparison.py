"""The tables and the plot of an evaluation: safety, over-refusal and general ability, always side by side.

A table without one of the three misleads: a model that refuses everything is "safe". A section without figures says
"not evaluated". Rates are in percent; `n` is the number of items behind a column.

Which measures are shown, and how: `measure_table.py`.
"""

from __future__ import annotations

import textwrap
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safevlm.files import replace_text
from safevlm.trainer.evaluation.eval_extra import require
from safevlm.trainer.evaluation.head.report import format_measure
from safevlm.trainer.evaluation.measure_table import (
    ANSWER_SECTIONS,
    Measure,
    head_measures,
    lmms_measures,
    measures_of,
)

NOT_EVALUATED = "not evaluated"


@dataclass(frozen=True)
class Column:
    """
    Args:
        title (`str`): The column's heading, such as `"figstep: attack success"`.
        measure (`Measure`): What it shows.
        tasks (`tuple[str, ...]`): The tasks whose mean it shows; several if a group is one column.
    """

    title: str
    measure: Measure
    tasks: tuple[str, ...]


def columns(report: dict[str, Any]) -> list[Column]:
    """The columns that the report's systems have values for, by section. The tasks of a group share a column."""
    measured = next(iter(report["systems"].values()))["metrics"]
    ours = [measure for measure in measures_of("task", "judge") if "comparison" in measure.shown_in]
    chosen = []
    for name in report["tasks"]:
        members = [task for task in report["groups"].get(name, [name]) if task in measured]
        of_lmms = lmms_measures(name)
        for measure in (*ours, *of_lmms):
            tasks = tuple(task for task in members if measure.name in measured[task])
            if tasks:
                title = name if of_lmms == (measure,) else f"{name}: {measure.title}"
                chosen.append(Column(title, measure, tasks))
    return sorted(chosen, key=lambda column: ANSWER_SECTIONS.index(column.measure.section))


def cell(report: dict[str, Any], system: str, column: Column) -> float | None:
    """The unweighted mean over the column's tasks, as in the paper's averages; `None` if a task lacks the measure."""
    values = [report["systems"][system]["metrics"][task].get(column.measure.name) for task in column.tasks]
    return None if None in values else sum(values) / len(values)


def num_items(report: dict[str, Any], column: Column) -> int:
    """How many items are behind a column."""
    counts = next(iter(report["systems"].values()))["num_items"]
    return sum(counts[task][column.measure.name] for task in column.tasks)


def markdown_table(report: dict[str, Any]) -> str:
    """One row per system; arrows say which direction is better."""
    header, cells = [], {system: [] for system in report["systems"]}
    all_columns = columns(report)
    for section in ANSWER_SECTIONS:
        of_section = [column for column in all_columns if column.measure.section == section]
        if not of_section:
            header.append(f"**{section}**")
            for row in cells.values():
                row.append(NOT_EVALUATED)
        for column in of_section:
            unit = "%" if column.measure.percent else ""
            count = num_items(report, column)
            header.append(f"**{section}**: {column.title} {unit}{column.measure.arrow} (n={count})")
            for system, row in cells.items():
                row.append(_shown(cell(report, system, column), column.measure))
    return _markdown(["system", *header], [[system, *row] for system, row in cells.items()])


def head_table(report: dict[str, Any]) -> str:
    """
    How good the verdicts are, in percent with 95 % intervals, for the systems that gave verdicts on labelled rows;
    empty if there are none.
    """
    measures = head_measures("comparison")
    heads = {system: facts["head"] for system, facts in report["systems"].items() if "head" in facts}
    if not heads:
        return ""
    rows = [
        [system, *(format_measure(head["overall"][measure.name]) for measure in measures), str(head["num_measured"])]
        for system, head in heads.items()
    ]
    return _markdown(["verdicts of", *(measure.title for measure in measures), "rows"], rows)


def _shown(value: float | None, measure: Measure) -> str:
    if value is None:
        return "-"
    return f"{100 * value / measure.scale:.1f}" if measure.percent else f"{value:.2f}"


def _markdown(header: list[str], rows: list[list[str]]) -> str:
    lines = [f"| {' | '.join(header)} |", "|---|" + "---:|" * (len(header) - 1)]
    lines += [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join(lines) + "\n"


def write_comparison(report: dict[str, Any], output: Path):
    """Writes `comparison.md`, and `comparison.png` if there is both safety and usefulness to show."""
    environment = report["environment"]
    facts = (
        f"`{report['command']}`\n\n{environment['device']}, torch {environment['torch']}, transformers "
        f"{environment['transformers']}, lmms-eval {environment['lmms_eval']}, safevlm {environment['safevlm']}, "
        f"{environment['date']}; seed {report['settings']['seed']}, judge `{report['settings']['judge']}`."
    )
    tables = [table for table in (markdown_table(report), head_table(report)) if table]
    facts = "\n\n".join([facts, *warnings(report)])
    replace_text(output / "comparison.md", "\n".join([*tables, facts + "\n"]))
    points, means = plot_points(report)
    if points:
        draw(points, means, output / "comparison.png")


def warnings(report: dict[str, Any]) -> list[str]:
    """What a reader of the table must know about single systems."""
    lines = []
    for name, facts in report["systems"].items():
        if unread := facts.get("num_guard_replies_without_verdict"):
            lines.append(f"`{name}`: {unread} replies of the guard had no verdict; these items were refused.")
        if failed := facts.get("num_failed_verdicts"):
            lines.append(
                f"`{name}`: {failed} verdicts failed because the head's numbers were not finite; see the answers."
            )
        if unfinished := facts.get("num_unfinished_reasoning"):
            lines.append(
                f"`{name}`: {unfinished} answers were cut off in their reasoning and do not count as refusals; raise "
                f"`--max-new-tokens`."
            )
    return lines


# -- the plot --------------------------------------------------------------------------------------------------------


def plot_points(report: dict[str, Any]) -> tuple[dict[str, tuple[float, float]], tuple[str, str]]:
    """
    `{system: (usefulness, safety)}` in percent, and a text on what each is the mean of. Empty if one is not measured.

    Safety is the mean of 100 - attack success rate. Usefulness is the mean of general ability in percent of the full
    score and of 100 - over-refusal rate, where measured.
    """
    all_columns = columns(report)
    safety = [column for column in all_columns if column.measure.name == "attack_success_rate"]
    usefulness = [column for column in all_columns if column.measure.section != "safety"]
    if not safety or not usefulness:
        return {}, ("", "")
    points = {
        system: (_mean(report, system, usefulness), _mean(report, system, safety)) for system in report["systems"]
    }
    points = {system: point for system, point in points.items() if None not in point}
    return points, (_mean_of(usefulness), _mean_of(safety))


def _mean(report: dict[str, Any], system: str, of_columns: list[Column]) -> float | None:
    """The mean over columns in percent, turned so that higher is better; `None` if the system lacks one."""
    shares = []
    for column in of_columns:
        value = cell(report, system, column)
        if value is None:
            return None
        share = value / column.measure.scale
        shares.append(share if column.measure.higher_is_better else 1 - share)
    return 100 * sum(shares) / len(shares)


def _mean_of(of_columns: list[Column]) -> str:
    """What an axis is the mean of, by measure: "100 - over-refusal (own, mossbench), exact match (own)"."""
    tasks: dict[str, list[str]] = {}
    for column in of_columns:
        task, _, title = column.title.rpartition(": ")
        title = title if column.measure.higher_is_better else f"100 - {title}"
        tasks.setdefault(title, []).extend([task] if task else [])
    return ", ".join(f"{title} ({', '.join(names)})" if names else title for title, names in tasks.items())


def draw(points: dict[str, tuple[float, float]], means: tuple[str, str], path: Path):
    """Plots safety against usefulness: the better a system, the further up and to the right."""
    require("matplotlib", "The plot needs")
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    figure = make_figure(points, means)
    FigureCanvasAgg(figure)  # without pyplot there is no global state, and no display is needed
    figure.savefig(path, dpi=150)


def make_figure(points: dict[str, tuple[float, float]], means: tuple[str, str]):
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 6), layout="constrained")
    axes = figure.subplots()
    # Systems often lie on the same spot. Those with the same values share a marker; open markers of decreasing size
    # keep neighbours apart, and the legend has names and values.
    systems_at: dict[str, list[str]] = {}
    for system, (x, y) in points.items():
        systems_at.setdefault(f"{x:.1f}, {y:.1f}", []).append(system)
    for number, (values, systems) in enumerate(systems_at.items()):
        axes.plot(
            *points[systems[0]],
            linestyle="none",
            marker="osD^vP*Xph"[number % 10],
            markersize=16 - 9 * number / max(len(systems_at) - 1, 1),
            markerfacecolor="none",
            markeredgewidth=1.8,
            clip_on=False,
            zorder=3,
            label=_wrapped(f"{', '.join(systems)}: {values}", 28),
        )
    axes.set(xlim=(-4, 104), ylim=(-4, 104), xlabel="usefulness (%)", ylabel="safety (%)")
    axes.grid(alpha=0.3)
    figure.legend(loc="outside right upper", title="system: usefulness, safety", labelspacing=1.2, fontsize=9)
    notes = [
        _wrapped(f"{name}: mean of {mean}", 110) for name, mean in zip(("Usefulness", "Safety"), means, strict=True)
    ]
    figure.supxlabel("\n".join(notes), fontsize=8.5, color="#555555", x=0.01, ha="left")
    return figure


def _wrapped(text: str, width: int) -> str:
    return "\n".join(textwrap.wrap(text, width, break_long_words=False, break_on_hyphens=False))
