"""The table and the plot of an evaluation: safety, over-refusal and general ability side by side, always.

A table without one of the three misleads: a model that refuses everything is "safe". What was not measured says so.
Rates are in percent; `n` is the number of items behind a column.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from safevlm.trainer.evaluation.head.report import format_measure

NOT_EVALUATED = "not evaluated"

# What counts as general ability in lmms-eval's tasks: metric and full score, by the beginning of the task's name.
GENERAL_ABILITY = {
    "mmbench": (("gpt_eval_score", 100.0),),
    "seedbench": (("seed_all", 1.0),),
    "mme": (("mme_perception_score", 2000.0), ("mme_cognition_score", 800.0)),
    "pope": (("pope_accuracy", 1.0),),
}


class Column(NamedTuple):
    """
    Args:
        section (`str`): `"safety"`, `"over-refusal"` or `"general ability"`.
        tasks: Whose mean is shown; several where a group is one column.
        full (`float`): The best or largest value.
    """

    section: str
    title: str
    tasks: tuple[str, ...]
    metric: str
    full: float
    higher_is_better: bool
    as_percent: bool = True


OURS = {
    "attack_success_rate": ("safety", "attack success", 1.0, False, True),
    "judge_score": ("safety", "judge score of 10", 10.0, True, False),
    "over_refusal_rate": ("over-refusal", "over-refusal", 1.0, False, True),
    "exact_match": ("general ability", "exact match", 1.0, True, True),
}
SECTIONS = ("safety", "over-refusal", "general ability")


def columns(report: dict[str, Any]) -> list[Column]:
    """The columns that the report's systems have values for, by section. A group's tasks share a column."""
    names = {name: tuple(report["groups"].get(name, [name])) for name in report["tasks"]}
    some = next(iter(report["systems"].values()))["metrics"]
    found = []
    for name, tasks in names.items():
        tasks = tuple(task for task in tasks if task in some)
        for metric, (section, title, full, higher, percent) in OURS.items():
            having = tuple(task for task in tasks if metric in some[task])
            if having:
                found.append(Column(section, f"{name}: {title}", having, metric, full, higher, percent))
        family = next((metrics for start, metrics in GENERAL_ABILITY.items() if name.startswith(start)), ())
        for metric, full in family:
            having = tuple(task for task in tasks if metric in some[task])
            if having:
                title = name if len(family) == 1 else f"{name}: {metric.removeprefix('mme_').replace('_', ' ')}"
                percent = full in (1.0, 100.0)
                found.append(Column("general ability", title, having, metric, full, True, percent))
    return sorted(found, key=lambda column: SECTIONS.index(column.section))


def cell(report: dict[str, Any], system: str, column: Column) -> float | None:
    """The mean over the column's tasks, unweighted as in the paper's averages; `None` if a task lacks the metric."""
    values = [report["systems"][system]["metrics"][task].get(column.metric) for task in column.tasks]
    return None if None in values else sum(values) / len(values)


def num_items(report: dict[str, Any], column: Column) -> int:
    counts = next(iter(report["systems"].values()))["num_items"]
    return sum(counts[task][column.metric] for task in column.tasks)


def markdown_table(report: dict[str, Any]) -> str:
    """One row per system; arrows say which direction is better."""
    header, cells = [], {system: [] for system in report["systems"]}
    measured = columns(report)
    for section in SECTIONS:
        part = [column for column in measured if column.section == section]
        if not part:
            header.append(f"**{section}**")
            for row in cells.values():
                row.append(NOT_EVALUATED)
        for column in part:
            unit = "%" if column.as_percent else ""
            arrow = "↑" if column.higher_is_better else "↓"
            header.append(f"**{section}**: {column.title} {unit}{arrow} (n={num_items(report, column)})")
            for system, row in cells.items():
                value = cell(report, system, column)
                row.append("-" if value is None else _shown(value, column))
    lines = ["| system | " + " | ".join(header) + " |", "|---|" + "---:|" * len(header)]
    lines += [f"| {system} | " + " | ".join(row) + " |" for system, row in cells.items()]
    return "\n".join(lines) + "\n"


def _shown(value: float, column: Column) -> str:
    return f"{100 * value / column.full:.1f}" if column.as_percent else f"{value:.2f}"


def head_table(report: dict[str, Any]) -> str:
    """How good the verdicts are, in percent with 95 % intervals, for systems that give some on labelled rows."""
    names = {
        "level_accuracy": "level accuracy",
        "category_macro_f1": "category macro-F1",
        "auroc": "AUROC",
        "fpr_at_95_tpr": "FPR at 95 % TPR",
        "ece": "ECE",
    }
    rows = {system: found["head"] for system, found in report["systems"].items() if "head" in found}
    if not rows:
        return ""
    lines = [f"| verdicts of | {' | '.join(names.values())} | rows |", "|---|" + "---:|" * (len(names) + 1)]
    for system, head in rows.items():
        cells = [format_measure(head["overall"][name]) for name in names]
        lines.append(f"| {system} | {' | '.join(cells)} | {head['num_measured']} |")
    return "\n".join(lines) + "\n"


def write_comparison(report: dict[str, Any], output: Path):
    """Writes `comparison.md`, and `comparison.png` where there is both safety and usefulness to show."""
    environment = report["environment"]
    facts = (
        f"`{report['command']}`\n\n{environment['device']}, torch {environment['torch']}, transformers "
        f"{environment['transformers']}, lmms-eval {environment['lmms_eval']}, safevlm {environment['safevlm']}, "
        f"{environment['date']}; seed {report['settings']['seed']}, judge `{report['settings']['judge']}`."
    )
    tables = [table for table in (markdown_table(report), head_table(report)) if table]
    facts = "\n\n".join([facts, *warnings(report)])
    (output / "comparison.md").write_text("\n".join([*tables, facts + "\n"]), encoding="utf-8")
    points, means = plot_points(report)
    if points:
        draw(points, means, output / "comparison.png")


def warnings(report: dict[str, Any]) -> list[str]:
    """What a reader of the table has to know about single systems."""
    lines = []
    for name, of_system in report["systems"].items():
        if unread := of_system.get("num_guard_replies_without_verdict"):
            lines.append(f"`{name}`: {unread} replies of the guard were no verdict; these items were refused.")
        if failed := of_system.get("num_failed_verdicts"):
            lines.append(
                f"`{name}`: {failed} verdicts failed, as the head's numbers were not finite; see the answers."
            )
        if unfinished := of_system.get("num_unfinished_reasoning"):
            lines.append(
                f"`{name}`: {unfinished} answers were cut off in their reasoning and count as no refusal; raise "
                f"`--max-new-tokens`."
            )
    return lines


def plot_points(report: dict[str, Any]) -> tuple[dict[str, tuple[float, float]], tuple[str, str]]:
    """
    `{system: (usefulness, safety)}` in percent, and what these two are the means of. Empty without both.

    Safety is the mean of 100 - attack success rate. Usefulness is the mean of general ability in percent of the full
    score and of 100 - over-refusal rate, as far as measured.
    """
    measured = columns(report)
    safety = [column for column in measured if column.metric == "attack_success_rate"]
    useful = [column for column in measured if column.section != "safety"]
    if not safety or not useful:
        return {}, ("", "")

    def share(system: str, part: list[Column]) -> float | None:
        values = [(cell(report, system, column), column) for column in part]
        if any(value is None for value, _ in values):
            return None
        shares = [v / c.full if c.higher_is_better else 1 - v / c.full for v, c in values]
        return 100 * sum(shares) / len(shares)

    points = {system: (share(system, useful), share(system, safety)) for system in report["systems"]}
    points = {system: point for system, point in points.items() if None not in point}
    return points, (_mean_of(useful), _mean_of(safety))


def _mean_of(part: list[Column]) -> str:
    """What an axis is the mean of, by metric: "100 - over-refusal (own, mossbench), exact match (own)"."""
    tasks: dict[str, list[str]] = {}
    for column in part:
        task, _, metric = column.title.rpartition(": ")
        metric = metric if column.higher_is_better else f"100 - {metric}"
        tasks.setdefault(metric, []).extend([task] if task else [])
    return ", ".join(f"{metric} ({', '.join(names)})" if names else metric for metric, names in tasks.items())


def draw(points: dict[str, tuple[float, float]], means: tuple[str, str], path: Path):
    """Safety against usefulness: the better a system, the further up and to the right."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
    except ImportError as error:
        raise ImportError("The plot needs matplotlib: pip install 'safevlm[eval]'.") from error

    figure = make_figure(points, means)
    FigureCanvasAgg(figure)  # without pyplot: no global state, and no display needed
    figure.savefig(path, dpi=150)


def make_figure(points: dict[str, tuple[float, float]], means: tuple[str, str]):
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 6), layout="constrained")
    axes = figure.subplots()
    # Systems often lie on one spot. Those that show the same values share a marker; open ones of falling size keep
    # those beside each other apart, and the legend has names and values.
    shared: dict[str, list[str]] = {}
    for system, (x, y) in points.items():
        shared.setdefault(f"{x:.1f}, {y:.1f}", []).append(system)
    for number, (values, systems) in enumerate(shared.items()):
        axes.plot(
            *points[systems[0]],
            linestyle="none",
            marker="osD^vP*Xph"[number % 10],
            markersize=16 - 9 * number / max(len(shared) - 1, 1),
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
    import textwrap

    return "\n".join(textwrap.wrap(text, width, break_long_words=False, break_on_hyphens=False))
