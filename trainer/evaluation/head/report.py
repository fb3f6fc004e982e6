"""The safety head's measures with 95 % intervals and counts: overall, per category and per source.

Intervals are percentile bootstraps over images: rows that share an image are drawn together. An interval shows how
much a measure varies with the data, not what the data lack: a rate of 0 or 1 has an interval of width zero, since no
resample can hold a kind of row that the data do not.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from safevlm.safety_labels import SafetyLabels
from safevlm.safety_policy import SafetyPolicy
from safevlm.trainer.evaluation.bootstrap import CONFIDENCE, percentile_interval, resample_weights
from safevlm.trainer.evaluation.measure_table import measures_of

from .measures import (
    category_measures,
    label_measures,
    reliability_curve,
    resampled_category_measures,
    resampled_label_measures,
    resampled_risk_measures,
    risk_measures,
)
from .outcomes import HeadOutcomes, head_outcomes, usable
from .predictions import HeadPrediction


def head_report(
    predictions: Sequence[HeadPrediction],
    policy: SafetyPolicy | dict | str,
    labels: SafetyLabels,
    num_resamples: int = 1000,
    seed: int = 0,
) -> dict:
    """
    All measures of the head under a policy, ready for JSON.

    Args:
        predictions (`Sequence[HeadPrediction]`): Rows without labels or image are counted and left out.
        policy (`SafetyPolicy`, `dict`, file or preset name): Its temperatures and thresholds make the verdicts.
        labels (`SafetyLabels`): The model's.
        num_resamples (`int`): Number of bootstrap resamples; 0 for no intervals.
        seed (`int`): Seed of the resamples.

    Returns:
        `dict` with counts; `overall`, `by_source` and `by_category`, each measure as `{"value", "low", "high",
        "num_rows"}` (`None` where not defined); `confusion_matrix` of categories and levels (rows are labels); and
        `reliability` of the risk score and of the category. A category's `auroc`, `auprc`, `fpr_at_95_tpr`, `ece` and
        `recall` compare its risky rows with all clean rows.

    Raises:
        `ValueError`: No row has both labels and an image.
    """
    policy = SafetyPolicy.from_value(policy).for_labels(labels)
    outcomes = head_outcomes(predictions, policy, labels)
    measured = _measure(outcomes, _report_slices(outcomes, labels), num_resamples, seed)
    by_category = measured["by_category"]
    for category, name in enumerate(labels.category_names):
        rows = outcomes[outcomes.category_labels == category]
        by_category[name] = {"num_rows": len(rows), "num_images": rows.num_images, **by_category[name]}
    return {
        "policy": policy.to_dict(),
        "num_rows": len(predictions),
        "num_without_image": sum(not p.assessed for p in predictions),
        "num_without_labels": sum(p.level is None or p.category is None for p in predictions),
        "num_measured": len(usable(predictions)),
        "num_risky": int(outcomes.risky.sum()),
        "num_images": outcomes.num_images,
        "intervals": {
            "method": "percentile bootstrap over images",
            "confidence": CONFIDENCE,
            "num_resamples": num_resamples,
            "seed": seed,
        },
        "overall": measured["overall"][""],
        "by_source": measured["by_source"],
        "by_category": by_category,
        "confusion_matrix": {
            "category": _confusion(outcomes.category_labels, outcomes.categories, labels.category_names),
            "level": _confusion(outcomes.level_labels, outcomes.levels, labels.level_names),
        },
        "reliability": {
            "risk": reliability_curve(outcomes.risky, outcomes.scores),
            "category": reliability_curve(outcomes.category_correct, outcomes.category_confidence),
        },
    }


def operating_point(
    predictions: Sequence[HeadPrediction],
    policy: SafetyPolicy | dict | str,
    labels: SafetyLabels,
    num_resamples: int = 1000,
    seed: int = 0,
) -> dict:
    """`recall` of risky rows and `false_positive_rate` on clean rows under a policy, as in [`head_report`]."""
    outcomes = head_outcomes(predictions, SafetyPolicy.from_value(policy).for_labels(labels), labels)
    rates = _Kind(("recall", "false_positive_rate"), risk_measures, resampled_risk_measures)
    return _measure(outcomes, [_Slice("", "", rates, np.arange(len(outcomes)))], num_resamples, seed)[""][""]


def format_head_report(report: dict) -> str:
    """A report's measures as a table for the terminal: percentages with their 95 % intervals."""
    lines = [
        f"{report['num_measured']} rows about {report['num_images']} images, {report['num_risky']} of them risky; "
        f"policy {report['policy']['name']!r}"
    ]
    if left_out := report["num_rows"] - report["num_measured"]:
        lines.append(
            f"{left_out} rows left out ({report['num_without_image']} without an image, "
            f"{report['num_without_labels']} without labels)"
        )
    lines += [f"  {name:<22}{format_measure(measure)}" for name, measure in report["overall"].items()]
    columns = ("f1", "auroc", "recall", "level_accuracy")
    lines.append("  " + f"{'category':<24}{'rows':>6}  " + "".join(f"{name:<22}" for name in columns))
    for category, values in report["by_category"].items():
        cells = [format_measure(values[name]) if name in values else "-" for name in columns]
        lines.append("  " + f"{category:<24}{values['num_rows']:>6}  " + "".join(f"{cell:<22}" for cell in cells))
    return "\n".join(line.rstrip() for line in lines)


def format_measure(measure: dict) -> str:
    """`"75.0 (50.0-100.0)"`: a report's measure in percent, with its interval where it has one."""
    if measure["value"] is None:
        return "not defined"
    interval = "" if measure["low"] is None else f" ({100 * measure['low']:.1f}-{100 * measure['high']:.1f})"
    return f"{100 * measure['value']:.1f}{interval}"


# -- slices of the rows, measured on common resamples ----------------------------------------------------------------


@dataclass(frozen=True)
class _Kind:
    """Measures that are computed together: their names, their values, and their values for many resamples."""

    names: tuple[str, ...]
    values: Callable[[HeadOutcomes], dict[str, float | None]]
    resampled: Callable[[HeadOutcomes, np.ndarray], dict[str, np.ndarray]]


@dataclass(frozen=True)
class _Slice:
    """Some rows, what is measured on them, and the part and name under which the report shows it."""

    part: str
    name: str
    kind: _Kind
    rows: np.ndarray


def _names(source: str) -> tuple[str, ...]:
    return tuple(measure.name for measure in measures_of(source))


_LABELS = _Kind(_names("labels"), label_measures, resampled_label_measures)
_LEVELS = _Kind(("level_accuracy", "level_kappa"), label_measures, resampled_label_measures)
_RISK = _Kind(_names("risk"), risk_measures, resampled_risk_measures)


def _report_slices(outcomes: HeadOutcomes, labels: SafetyLabels) -> list[_Slice]:
    all_rows = np.arange(len(outcomes))
    slices = [_Slice("overall", "", kind, all_rows) for kind in (_LABELS, _RISK)]
    for source in sorted(set(outcomes.sources.tolist())):
        rows = np.flatnonzero(outcomes.sources == source)
        slices += [_Slice("by_source", source, kind, rows) for kind in (_LABELS, _RISK)]
    for category, name in enumerate(labels.category_names):
        one_category = _Kind(
            _names("category"),
            partial(category_measures, category=category),
            lambda rows, weights, category=category: resampled_category_measures(rows, category, weights),
        )
        labelled = outcomes.category_labels == category
        slices.append(_Slice("by_category", name, one_category, all_rows))
        slices.append(_Slice("by_category", name, _LEVELS, np.flatnonzero(labelled)))
        if category != labels.safe_category_id:
            risky = labelled & outcomes.risky
            against_clean = np.flatnonzero(risky | ~outcomes.risky) if risky.any() else all_rows[:0]
            slices.append(_Slice("by_category", name, _RISK, against_clean))
    return slices


def _measure(outcomes: HeadOutcomes, slices: Sequence[_Slice], num_resamples: int, seed: int) -> dict:
    """`{part: {name: {measure: {"value", "low", "high", "num_rows"}}}}`."""
    slice_outcomes = [outcomes[part.rows] for part in slices]
    intervals = _intervals(outcomes, slices, slice_outcomes, num_resamples, seed)
    report = defaultdict(lambda: defaultdict(dict))
    for part, of_slice, interval in zip(slices, slice_outcomes, intervals, strict=True):
        values = part.kind.values(of_slice) if len(of_slice) else dict.fromkeys(part.kind.names)
        for name in part.kind.names:
            low, high = (values[name] is not None and interval.get(name)) or (None, None)
            report[part.part][part.name][name] = {
                "value": values[name],
                "low": low,
                "high": high,
                "num_rows": len(of_slice),
            }
    return {part: {name: dict(values) for name, values in names.items()} for part, names in report.items()}


def _intervals(
    outcomes: HeadOutcomes,
    slices: Sequence[_Slice],
    slice_outcomes: Sequence[HeadOutcomes],
    num_resamples: int,
    seed: int,
) -> list[dict[str, tuple[float, float] | None]]:
    """For each slice, the intervals of its measures; all slices are measured on the same resamples."""
    resampled = [defaultdict(list) for _ in slices]
    if num_resamples and outcomes.num_images > 1:  # a single image has nothing to vary
        for weights in resample_weights(outcomes.groups, num_resamples, seed):
            for part, of_slice, values in zip(slices, slice_outcomes, resampled, strict=True):
                if len(of_slice):
                    for name, chunk in part.kind.resampled(of_slice, weights[:, part.rows]).items():
                        values[name].append(chunk)
    return [
        {name: percentile_interval(np.concatenate(chunks)) for name, chunks in values.items()} for values in resampled
    ]


def _confusion(labels: np.ndarray, verdicts: np.ndarray, names: Sequence[str]) -> dict:
    from sklearn.metrics import confusion_matrix

    counts = confusion_matrix(labels, verdicts, labels=np.arange(len(names)))
    return {"labels": list(names), "counts": counts.tolist()}
