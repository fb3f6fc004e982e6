"""The safety head's measures with 95 % intervals and counts: overall, per category and per source.

Intervals are percentile bootstraps over images: rows that share an image are drawn together. They say how much the
data vary, not what they lack: a rate of 0 or 1 has an interval without width, since no resample holds a row that the
data do not.
"""

from collections import defaultdict
from collections.abc import Sequence

import numpy as np

from safevlm.safety_labels import SafetyLabels
from safevlm.safety_policy import SafetyPolicy
from safevlm.trainer.evaluation.bootstrap import CONFIDENCE, percentile_interval, resample_weights

from .measures import (
    HeadOutcomes,
    category_measures,
    head_outcomes,
    label_measures,
    reliability_curve,
    resampled_category_measures,
    resampled_label_measures,
    resampled_risk_measures,
    risk_measures,
    usable,
)
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
        num_resamples (`int`): Of the bootstrap; 0 for no intervals.

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
    everything = np.arange(len(outcomes))
    slices = [("overall", "", _ROW_MEASURES, everything)]
    slices += [("by_source", str(s), _ROW_MEASURES, np.flatnonzero(outcomes.sources == s)) for s in _sources(outcomes)]
    for category, name in enumerate(labels.category_names):
        labelled = outcomes.category_labels == category
        slices.append(("by_category", name, _one_category(category), everything))
        slices.append(("by_category", name, _LEVEL_MEASURES, np.flatnonzero(labelled)))
        if category != labels.safe_category_id:
            against_clean = (labelled & outcomes.risky) | ~outcomes.risky
            has_risky = (labelled & outcomes.risky).any()
            slices.append(
                ("by_category", name, _RISK_MEASURES, np.flatnonzero(against_clean) if has_risky else everything[:0])
            )
    measured = _measure(outcomes, slices, num_resamples, seed)
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
    num_resamples=1000,
    seed=0,
) -> dict:
    """`recall` of risky rows and `false_positive_rate` on clean rows under a policy, as in [`head_report`]."""
    outcomes = head_outcomes(predictions, SafetyPolicy.from_value(policy).for_labels(labels), labels)
    kind = (("recall", "false_positive_rate"), risk_measures, resampled_risk_measures)
    everything = np.arange(len(outcomes))
    return _measure(outcomes, [("point", "", kind, everything)], num_resamples, seed)["point"][""]


def format_head_report(report: dict) -> str:
    """A table of a report's measures, percentages with their 95 % interval, for the terminal."""
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
    names = ("f1", "auroc", "recall", "level_accuracy")
    lines.append("  " + f"{'category':<24}{'rows':>6}  " + "".join(f"{name:<22}" for name in names))
    for category, values in report["by_category"].items():
        cells = [format_measure(values[name]) if name in values else "-" for name in names]
        lines.append("  " + f"{category:<24}{values['num_rows']:>6}  " + "".join(f"{cell:<22}" for cell in cells))
    return "\n".join(line.rstrip() for line in lines)


def format_measure(measure: dict) -> str:
    if measure["value"] is None:
        return "not defined"
    interval = "" if measure["low"] is None else f" ({100 * measure['low']:.1f}-{100 * measure['high']:.1f})"
    return f"{100 * measure['value']:.1f}{interval}"


# Each kind of measures: its names, the values, and the values for many resamples.
_LABEL_NAMES = ("category_macro_f1", "level_accuracy", "level_kappa", "category_ece")
_RISK_NAMES = ("auroc", "auprc", "fpr_at_95_tpr", "ece", "recall", "false_positive_rate")
_RISK_MEASURES = (_RISK_NAMES, risk_measures, resampled_risk_measures)
_LEVEL_MEASURES = (("level_accuracy", "level_kappa"), label_measures, resampled_label_measures)
_ROW_MEASURES = (
    _LABEL_NAMES + _RISK_NAMES,
    lambda outcomes: label_measures(outcomes) | risk_measures(outcomes),
    lambda outcomes, weights: resampled_label_measures(outcomes, weights) | resampled_risk_measures(outcomes, weights),
)


def _one_category(category: int):
    return (
        ("precision", "recall_of_category", "f1"),
        lambda outcomes: category_measures(outcomes, category),
        lambda outcomes, weights: resampled_category_measures(outcomes, category, weights),
    )


def _measure(outcomes: HeadOutcomes, slices, num_resamples: int, seed: int) -> dict:
    """Measures slices `(part, name, kind of measures, rows)` on the same resamples."""
    report = defaultdict(lambda: defaultdict(dict))
    resampled = [defaultdict(list) for _ in slices]
    parts = [outcomes[rows] for *_, rows in slices]
    if outcomes.num_images > 1:  # one image has nothing to vary
        for weights in resample_weights(outcomes.groups, num_resamples, seed) if num_resamples else ():
            for (_, _, (_, _, measure), rows), part, values in zip(slices, parts, resampled, strict=True):
                if len(rows):
                    for measure_name, chunk in measure(part, weights[:, rows]).items():
                        values[measure_name].append(chunk)
    for (section, name, (names, measure, _), rows), part, values in zip(slices, parts, resampled, strict=True):
        measured = measure(part) if len(rows) else dict.fromkeys(names)
        for measure_name in names:
            value = measured[measure_name]
            interval = None
            if value is not None and values[measure_name]:
                interval = percentile_interval(np.concatenate(values[measure_name]))
            low, high = interval or (None, None)
            report[section][name][measure_name] = {"value": value, "low": low, "high": high, "num_rows": len(rows)}
    return {section: {name: dict(values) for name, values in names.items()} for section, names in report.items()}


def _sources(outcomes: HeadOutcomes) -> list[str]:
    return sorted(set(outcomes.sources.tolist()))


def _confusion(labels, predictions, names) -> dict:
    from sklearn.metrics import confusion_matrix

    counts = confusion_matrix(labels, predictions, labels=np.arange(len(names)))
    return {"labels": list(names), "counts": counts.tolist()}
