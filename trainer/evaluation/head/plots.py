"""Plots of the safety head: confusion matrices, ROC and precision-recall curves, reliability, risk scores, and the
trade-off between safety and usefulness. The colours are those of Okabe and Ito, which colour-blind readers can tell
apart.
"""

import os
from collections.abc import Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from safevlm.safety_labels import SafetyLabels
from safevlm.safety_policy import SafetyPolicy
from safevlm.trainer.evaluation.measure_table import MEASURES

from .calibration import Calibration
from .measures import expected_calibration_error, reliability_curve
from .outcomes import HeadOutcomes, head_outcomes
from .predictions import HeadPrediction

BLUE, ORANGE, GREEN, VERMILION, PURPLE, SKY = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9"
GREY = "#777777"
LEVEL_COLOURS = (BLUE, "#F0E442", ORANGE, VERMILION)
MARKERS = "osD^vPX*"


def plot_head_report(
    predictions: Sequence[HeadPrediction],
    policy: SafetyPolicy | dict | str,
    labels: SafetyLabels,
    folder: str | os.PathLike,
) -> list[Path]:
    """
    Writes `confusion_matrix.png`, `roc_pr.png` (if both risky and clean rows occur), `reliability.png` and
    `risk_scores.png`.

    Args:
        predictions, policy, labels: As for [`head_report`].
        folder (`str` or `os.PathLike`): Created if it does not exist.

    Returns:
        `list[Path]`: The files written.
    """
    policy = SafetyPolicy.from_value(policy).for_labels(labels)
    outcomes = head_outcomes(predictions, policy, labels)
    plots = {"confusion_matrix": lambda path: plot_confusion(outcomes, labels, path)}
    if outcomes.has_risky_and_clean:
        plots["roc_pr"] = lambda path: plot_roc_pr(outcomes, path)
    plots["reliability"] = lambda path: plot_reliability({f"policy {policy.name}": outcomes}, path)
    plots["risk_scores"] = lambda path: plot_risk_scores(outcomes, policy, labels, path)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for name, plot in plots.items():
        paths.append(folder / f"{name}.png")
        plot(paths[-1])
    return paths


def plot_calibration(calibration: Calibration, labels: SafetyLabels, folder: str | os.PathLike) -> list[Path]:
    """
    Plots of the report half: those of [`plot_head_report`] under the calibrated policy, with reliability before and
    after, and `trade_off.png`.
    """
    half = calibration.report_half
    paths = plot_head_report(half, calibration.policy, labels, folder)
    policies = {"before": calibration.compared["present"], "after": calibration.policy}
    plot_reliability(
        {name: head_outcomes(half, policy, labels) for name, policy in policies.items()},
        Path(folder) / "reliability.png",
    )
    paths.append(Path(folder) / "trade_off.png")
    plot_trade_off(half, calibration.compared, calibration.report["operating_points"], labels, paths[-1])
    return paths


def plot_confusion(outcomes: HeadOutcomes, labels: SafetyLabels, path: str | os.PathLike):
    """Categories and levels, label against verdict: counts, shaded by their share of the label's rows."""
    from sklearn.metrics import confusion_matrix

    with _figure(path, "Verdicts of the safety head", outcomes, 1, 2, (12.5, 5.6), width_ratios=[7, 4.6]) as axes:
        for axis, title, true_ids, predicted_ids, names in (
            (axes[0], "Risk category", outcomes.category_labels, outcomes.categories, labels.category_names),
            (axes[1], "Risk level", outcomes.level_labels, outcomes.levels, labels.level_names),
        ):
            counts = confusion_matrix(true_ids, predicted_ids, labels=np.arange(len(names)))
            totals = counts.sum(axis=1)
            shares = counts / np.maximum(totals, 1)[:, None]
            axis.imshow(shares, cmap="Blues", vmin=0, vmax=1.15)
            for i, j in np.argwhere(counts > 0):
                axis.text(
                    j, i, f"{counts[i, j]:,}", ha="center", va="center", color="w" if shares[i, j] > 0.6 else "k"
                )
            axis.set_xticks(range(len(names)), names, rotation=35, ha="right", rotation_mode="anchor")
            axis.set_yticks(range(len(names)), [f"{n} ({total:,})" for n, total in zip(names, totals, strict=True)])
            axis.set(title=title, xlabel="verdict", ylabel="label (rows)")
            axis.tick_params(length=0)
            axis.spines[:].set_visible(False)


def plot_roc_pr(outcomes: HeadOutcomes, path: str | os.PathLike):
    """ROC and precision-recall curves of the risk score, each with the point of the policy's thresholds."""
    from sklearn.metrics import average_precision_score, precision_recall_curve, roc_auc_score, roc_curve

    risky, scores, flagged = outcomes.risky, outcomes.scores, outcomes.flagged
    recall, fpr = flagged[risky].mean(), flagged[~risky].mean()
    with _figure(path, "Telling risky rows from clean ones by the risk score", outcomes, 1, 2, (11, 5.2)) as axes:
        x, y, _ = roc_curve(risky, scores)
        axes[0].plot([0, 1], [0, 1], color=GREY, linestyle=":", label="chance")
        axes[0].plot(
            x, y, color=BLUE, label=f"{MEASURES['auroc'].title} {roc_auc_score(risky, scores):.4f}", clip_on=False
        )
        axes[0].plot(fpr, recall, "o", color=VERMILION, label="policy's thresholds", clip_on=False)
        axes[0].set(title="ROC", xlabel="false-positive rate (share of clean rows)", ylabel="recall of risky rows")
        y, x, _ = precision_recall_curve(risky, scores)
        axes[1].axhline(risky.mean(), color=GREY, linestyle=":", label="chance (share of risky rows)")
        label = f"{MEASURES['auprc'].title} {average_precision_score(risky, scores):.4f}"
        axes[1].plot(x, y, color=BLUE, label=label, drawstyle="steps-pre", clip_on=False)
        if flagged.any():
            precision = risky[flagged].mean()
            axes[1].plot(recall, precision, "o", color=VERMILION, label="policy's thresholds", clip_on=False)
        axes[1].set(title="Precision-recall", xlabel="recall of risky rows", ylabel="precision of flagged rows")
        for axis in axes:
            axis.set(xlim=(0, 1), ylim=(0, 1), aspect="equal")
            axis.legend(loc="lower right" if axis is axes[0] else "lower left")


def plot_reliability(outcomes: dict[str, HeadOutcomes], path: str | os.PathLike):
    """
    How often rows are risky, and categories right, by the probability that the head gives.

    Args:
        outcomes (`dict[str, HeadOutcomes]`): The same rows under one or more policies, by the name to show.
    """
    first = next(iter(outcomes.values()))
    ratios = [3.4, 1]
    with _figure(path, "Reliability of the probabilities", first, 2, 2, (11, 6.8), height_ratios=ratios) as axes:
        for column, (title, x_label, y_label) in enumerate(
            (
                ("Any risk", "risk score (probability of any risk)", "share of rows that are risky"),
                ("Category", "probability of the most probable category", "share of rows of this category"),
            )
        ):
            curve, histogram = axes[0][column], axes[1][column]
            curve.plot([0, 1], [0, 1], color=GREY, linestyle=":", label="perfectly calibrated")
            width = 0.8 / len(outcomes)
            for i, (name, of_policy) in enumerate(outcomes.items()):
                if column == 0:
                    events, probabilities = of_policy.risky, of_policy.scores
                else:
                    events, probabilities = of_policy.category_correct, of_policy.category_confidence
                bins = reliability_curve(events, probabilities)
                ece = expected_calibration_error(events, probabilities)
                colour, marker = (BLUE, VERMILION, GREEN, PURPLE)[i % 4], MARKERS[i]
                curve.plot(
                    [b["mean_probability"] for b in bins],
                    [b["observed_rate"] for b in bins],
                    color=colour,
                    marker=marker,
                    label=f"{name}: {MEASURES['ece'].title} {100 * ece:.2f} %",
                    clip_on=False,
                )
                step = bins[0]["high"] - bins[0]["low"]
                left = [b["low"] + step * (0.1 + i * width) for b in bins]
                histogram.bar(left, [b["count"] for b in bins], width=step * width, align="edge", color=colour)
            curve.set(title=title, ylabel=y_label, xlim=(0, 1), ylim=(0, 1))
            curve.legend(loc="best")
            histogram.set(xlabel=x_label, ylabel="rows (log)", xlim=(0, 1), yscale="log", ylim=(0.8, None))


def plot_risk_scores(outcomes: HeadOutcomes, policy: SafetyPolicy, labels: SafetyLabels, path: str | os.PathLike):
    """Histograms of the risk score per labelled level, with the policy's thresholds."""
    levels = [level for level in range(len(labels.level_names)) if (outcomes.level_labels == level).any()]
    edges = np.linspace(0, 1, 41)
    with _figure(
        path, "Risk scores by labelled level", outcomes, len(levels), 1, (9, 1.1 + 1.45 * len(levels))
    ) as axes:
        for axis, level in zip(np.atleast_1d(axes), levels, strict=True):
            scores = outcomes.scores[outcomes.level_labels == level]
            colour = LEVEL_COLOURS[min(level, len(LEVEL_COLOURS) - 1)]
            axis.hist(scores, bins=edges, color=colour, edgecolor="white", linewidth=0.5)
            axis.axvline(policy.risk_threshold, color="k", linewidth=1.2)
            for threshold in policy.category_risk_thresholds.values():
                axis.axvline(threshold, color="k", linewidth=0.9, linestyle=":")
            axis.set(xlim=(0, 1), yscale="log", ylim=(0.7, None), ylabel="rows (log)")
            axis.set_title(f"{labels.level_names[level]} ({len(scores):,} rows)", loc="left", fontsize=10)
            if level != levels[-1]:
                axis.tick_params(labelbottom=False)
        key = "line: the policy's risk threshold"
        if policy.category_risk_thresholds:
            key += "; dotted: thresholds of single categories"
        axis.set_xlabel(f"risk score (probability of any risk)\n{key}")


def plot_trade_off(
    predictions: Sequence[HeadPrediction],
    policies: dict[str, SafetyPolicy],
    points: dict[str, dict],
    labels: SafetyLabels,
    path: str | os.PathLike,
):
    """
    Safety against usefulness: recall of risky rows over the false-positive rate on clean rows.

    Args:
        policies (`dict[str, SafetyPolicy]`): The curve shows the scores of the last one as a single threshold moves
            over all rows. A policy with thresholds per category may lie beside the curve.
        points (`dict[str, dict]`): For each policy, what [`operating_point`] returned. Policies with the same point
            share a marker.
    """
    from sklearn.metrics import roc_curve

    last_name, last_policy = list(policies.items())[-1]
    outcomes = head_outcomes(predictions, last_policy, labels)
    fpr, recall, _ = roc_curve(outcomes.risky, outcomes.highest_scores, drop_intermediate=False)
    names_at: dict[tuple[float, float], list[str]] = {}
    for name in policies:
        point = points[name]["false_positive_rate"]["value"], points[name]["recall"]["value"]
        names_at.setdefault(point, []).append(name)
    with _figure(path, "Safety against usefulness", outcomes, 1, 1, (8.2, 5.6)) as axis:
        label = f"one threshold for all rows, scores of {last_name!r}"
        axis.plot(100 * fpr, 100 * recall, color=GREY, linewidth=1.4, label=label, zorder=1)
        highest_x, lowest_y = 4.0, 100.0
        for number, ((x, y), names) in enumerate(names_at.items()):
            x_below, x_above = _error_bar(points[names[0]]["false_positive_rate"])
            y_below, y_above = _error_bar(points[names[0]]["recall"])
            highest_x, lowest_y = max(highest_x, 100 * x + x_above), min(lowest_y, 100 * y - y_below)
            axis.errorbar(
                100 * x,
                100 * y,
                xerr=[[x_below], [x_above]],
                yerr=[[y_below], [y_above]],
                fmt=MARKERS[number % len(MARKERS)],
                markersize=8,
                color=VERMILION if last_name in names else (BLUE, ORANGE, GREEN, PURPLE, SKY)[number % 5],
                elinewidth=1,
                capsize=2.5,
                label=f"{', '.join(names)}: {100 * y:.1f} % at {100 * x:.1f} %",
                zorder=3,
            )
        right, bottom = min(1.25 * highest_x, 100), max(min(100 - 1.25 * (100 - lowest_y), 95), 0)
        axis.set(
            xlim=(-0.02 * right, right),
            ylim=(bottom - 0.03 * (100 - bottom), 100 + 0.03 * (100 - bottom)),
            xlabel="false-positive rate: clean rows flagged (%)",
            ylabel="recall: risky rows flagged (%)",
        )
        axis.legend(loc="lower right", title="policy: recall at false-positive rate (bars: 95 % interval)")


def _error_bar(measure: dict) -> tuple[float, float]:
    """How far a measure's interval reaches below and above its value, in percentage points; 0 without an interval."""
    value, low, high = measure["value"], measure["low"], measure["high"]
    return (0.0, 0.0) if low is None else (100 * max(value - low, 0), 100 * max(high - value, 0))


@contextmanager
def _figure(path, title: str, outcomes: HeadOutcomes, rows: int, columns: int, size: tuple[float, float], **ratios):
    """Axes to draw on. Afterwards the figure gets a title with the counts and is written as PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    # Without pyplot there is no global state, and no display is needed.
    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(rows, columns, gridspec_kw=ratios or None)
    yield axes
    for axis in np.atleast_1d(axes).flat:
        if not axis.images:
            axis.spines[["top", "right"]].set_visible(False)
            axis.grid(color="#e6e6e6", linewidth=0.6)
            axis.set_axisbelow(True)
        if legend := axis.get_legend():
            legend.set_frame_on(False)
    risky = int(outcomes.risky.sum())
    counts = f"{risky:,} risky and {len(outcomes) - risky:,} clean rows about {outcomes.num_images:,} images"
    figure.suptitle(f"{title}\n{counts}", fontsize=12)
    figure.savefig(path, dpi=130)
