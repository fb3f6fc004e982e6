"""Measures of the safety head: each as a value by scikit-learn, and for many bootstrap resamples at once.

scikit-learn takes a millisecond or more for one weighting of the rows. Intervals need thousands, so the
`resampled_...` functions compute all of them together from cumulative sums and confusion matrices; tests hold the two
equal. A measure that is not defined (AUROC of a single class) is `None`, and NaN in a resample.

What a measure is called and where it is shown: `measure_table.py`.
"""

from __future__ import annotations

import numpy as np

from safevlm.trainer.evaluation.eval_extra import require

from .outcomes import HeadOutcomes

NUM_BINS = 10
"""Bins of equal width for reliability and ECE."""
SENSITIVITY = 0.95
"""The true-positive rate at which `fpr_at_95_tpr` is taken."""


# -- measures of all labels: values, then resamples ------------------------------------------------------------------
# Resampled: `weights` of shape `(num_resamples, n)` says how often each row is drawn; results have the shape
# `(num_resamples,)`.


def label_measures(outcomes: HeadOutcomes) -> dict[str, float | None]:
    """`level_accuracy`, `level_kappa` (quadratic), `category_macro_f1` and `category_ece`."""
    from sklearn.metrics import cohen_kappa_score

    kappa = None
    if len(np.union1d(outcomes.level_labels, outcomes.levels)) > 1:
        # All ids up to the highest: the distance between two levels must not shrink because none between them occurs.
        ids = np.arange(max(outcomes.level_labels.max(), outcomes.levels.max()) + 1)
        kappa = float(cohen_kappa_score(outcomes.level_labels, outcomes.levels, labels=ids, weights="quadratic"))
    return {
        "level_accuracy": float((outcomes.level_labels == outcomes.levels).mean()),
        "level_kappa": kappa,
        "category_macro_f1": macro_f1(outcomes.category_labels, outcomes.categories),
        "category_ece": expected_calibration_error(outcomes.category_correct, outcomes.category_confidence),
    }


def resampled_label_measures(outcomes: HeadOutcomes, weights: np.ndarray) -> dict[str, np.ndarray]:
    total = weights.sum(axis=1)
    levels = _confusion(outcomes.level_labels, outcomes.levels, weights)  # (num_resamples, k, k)
    categories = _confusion(outcomes.category_labels, outcomes.categories, weights)
    labelled, predicted = categories.sum(axis=2), categories.sum(axis=1)
    correct = np.einsum("rcc->rc", categories)
    occurs = labelled > 0
    f1 = _divide(2 * correct, labelled + predicted)
    distance = np.subtract.outer(np.arange(levels.shape[1]), np.arange(levels.shape[1])) ** 2
    by_chance = np.einsum("ri,rj,ij->r", levels.sum(axis=2), levels.sum(axis=1), distance)
    return {
        "level_accuracy": _divide(np.einsum("rcc->r", levels), total),
        "level_kappa": 1 - _divide(np.einsum("rij,ij->r", levels, distance) * total, by_chance),
        "category_macro_f1": _divide(np.where(occurs, f1, 0.0).sum(axis=1), occurs.sum(axis=1)),
        "category_ece": _resampled_ece(outcomes.category_correct, outcomes.category_confidence, weights),
    }


# -- risky against clean rows ----------------------------------------------------------------------------------------


def risk_measures(outcomes: HeadOutcomes) -> dict[str, float | None]:
    """
    `auroc`, `auprc`, `fpr_at_95_tpr` and `ece` of the score for "level above 0"; and, at the policy's thresholds,
    `recall` (share of risky rows flagged) and `false_positive_rate` (share of clean rows flagged).
    """
    from sklearn.metrics import average_precision_score, roc_curve

    risky, scores = outcomes.risky, outcomes.scores
    fpr_at_tpr = auprc = None
    if outcomes.has_risky_and_clean:
        fpr, tpr, _ = roc_curve(risky, scores, drop_intermediate=False)
        fpr_at_tpr = float(fpr[tpr >= SENSITIVITY].min())
        auprc = float(average_precision_score(risky, scores))
    return {
        "auroc": auroc(risky, scores),
        "auprc": auprc,
        "fpr_at_95_tpr": fpr_at_tpr,
        "ece": expected_calibration_error(risky, scores),
        "recall": float(outcomes.flagged[risky].mean()) if risky.any() else None,
        "false_positive_rate": float(outcomes.flagged[~risky].mean()) if not risky.all() else None,
    }


def resampled_risk_measures(outcomes: HeadOutcomes, weights: np.ndarray) -> dict[str, np.ndarray]:
    risky, scores = outcomes.risky, outcomes.scores
    order = np.argsort(-scores, kind="stable")
    last = np.flatnonzero(np.append(np.diff(scores[order]) != 0, True))  # tied scores are one threshold
    true = np.cumsum((weights * risky)[:, order], axis=1)[:, last]  # (num_resamples, num_thresholds)
    false = np.cumsum((weights * ~risky)[:, order], axis=1)[:, last]
    num_risky, num_clean = true[:, -1], false[:, -1]
    tpr, fpr = _divide(true, num_risky[:, None]), _divide(false, num_clean[:, None])
    defined = (num_risky > 0) & (num_clean > 0)
    previous_tpr = np.pad(tpr, ((0, 0), (1, 0)))[:, :-1]
    precision = np.nan_to_num(_divide(true, true + false))
    sensitive = np.argmax(tpr >= SENSITIVITY, axis=1)
    curves = {
        "auroc": (np.diff(fpr, axis=1, prepend=0) * (tpr + previous_tpr) / 2).sum(axis=1),
        "auprc": ((tpr - previous_tpr) * precision).sum(axis=1),
        "fpr_at_95_tpr": fpr[np.arange(len(fpr)), sensitive],
    }
    return {
        **{name: np.where(defined, values, np.nan) for name, values in curves.items()},
        "ece": _resampled_ece(risky, scores, weights),
        "recall": _divide(weights @ (risky & outcomes.flagged), num_risky),
        "false_positive_rate": _divide(weights @ (~risky & outcomes.flagged), num_clean),
    }


# -- one category against all others ---------------------------------------------------------------------------------


def category_measures(outcomes: HeadOutcomes, category: int) -> dict[str, float | None]:
    """`precision`, `recall_of_category` and `f1` of the verdicts of one category."""
    from sklearn.metrics import precision_recall_fscore_support

    precision, recall, f1, _ = precision_recall_fscore_support(
        outcomes.category_labels == category, outcomes.categories == category, average="binary", zero_division=np.nan
    )
    values = {"precision": precision, "recall_of_category": recall, "f1": f1}
    return {name: None if np.isnan(value) else float(value) for name, value in values.items()}


def resampled_category_measures(outcomes: HeadOutcomes, category: int, weights: np.ndarray) -> dict[str, np.ndarray]:
    is_label, is_verdict = outcomes.category_labels == category, outcomes.categories == category
    correct, labelled, predicted = weights @ (is_label & is_verdict), weights @ is_label, weights @ is_verdict
    return {
        "precision": _divide(correct, predicted),
        "recall_of_category": _divide(correct, labelled),
        "f1": _divide(2 * correct, labelled + predicted),
    }


# -- without a policy ------------------------------------------------------------------------------------------------


def head_metrics(
    level_labels, level_predictions, category_labels, category_predictions, scores
) -> dict[str, float | int | None]:
    """
    The head's main measures, from plain arrays.

    Args:
        level_labels, level_predictions, category_labels, category_predictions (`int` arrays of shape `(n,)`)
        scores (`float` array of shape `(n,)`): Probability of any risk, in [0, 1].

    Returns:
        `category_macro_f1` over the categories that occur, `level_accuracy`, `auroc` of `scores` for "level above 0"
        (`None` if all rows are risky or all clean), all in [0, 1]; and `num_assessed`, the number of rows.
    """
    require("sklearn", "Measures of the safety head need")
    level_labels, category_labels = np.asarray(level_labels), np.asarray(category_labels)
    if not len(level_labels):
        raise ValueError("No labelled row with an image to evaluate the safety head on.")
    return {
        "category_macro_f1": macro_f1(category_labels, category_predictions),
        "level_accuracy": float((level_labels == level_predictions).mean()),
        "auroc": auroc(level_labels > 0, scores),
        "num_assessed": len(level_labels),
    }


def trainer_metrics(prediction) -> dict[str, float]:
    """
    `compute_metrics` of [`SafeVlmTrainer`]: the head's arg max, before any policy.

    Rows without labels or without an image are left out.
    """
    level_logits, category_logits, assessed = (_all_rows(prediction.predictions, i) for i in range(3))
    level_labels, category_labels = (_all_rows(prediction.label_ids, i) for i in (1, 2))
    known = (level_labels >= 0) & (category_labels >= 0) & assessed
    if not known.any():
        return {"num_assessed": 0}
    exponentials = np.exp(level_logits - level_logits.max(axis=-1, keepdims=True))
    scores = 1 - exponentials[:, 0] / exponentials.sum(axis=-1)
    metrics = head_metrics(
        level_labels[known],
        level_logits.argmax(-1)[known],
        category_labels[known],
        category_logits.argmax(-1)[known],
        scores[known],
    )
    return {name: value for name, value in metrics.items() if value is not None}


def _all_rows(parts, index: int) -> np.ndarray:
    """One of the Trainer's arrays over all rows. With `eval_do_concat_batches=False` it comes as a list of batches."""
    return np.concatenate([batch[index] for batch in parts]) if isinstance(parts, list) else parts[index]


# -- their parts -----------------------------------------------------------------------------------------------------


def macro_f1(labels: np.ndarray, predictions: np.ndarray) -> float:
    """Mean F1 of the classes that occur in `labels`."""
    from sklearn.metrics import f1_score

    return float(f1_score(labels, predictions, labels=np.unique(labels), average="macro", zero_division=0))


def auroc(risky: np.ndarray, scores: np.ndarray) -> float | None:
    """Area under the ROC curve; `None` if all rows are risky or all clean."""
    from sklearn.metrics import roc_auc_score

    return float(roc_auc_score(risky, scores)) if 0 < risky.sum() < len(risky) else None


def reliability_curve(correct: np.ndarray, probabilities: np.ndarray, num_bins: int = NUM_BINS) -> list[dict]:
    """
    How often an event happens, by the probability that the head gives it.

    Returns:
        One dict per non-empty bin of equal width: `low`, `high`, `mean_probability`, `observed_rate` (all in [0, 1])
        and `count`.
    """
    from sklearn.calibration import calibration_curve

    edges = np.linspace(0, 1, num_bins + 1)
    counts = np.bincount(_bins(probabilities, num_bins), minlength=num_bins)
    probabilities = np.clip(np.asarray(probabilities, dtype=float), 0, 1)
    observed, mean = calibration_curve(np.asarray(correct, dtype=bool), probabilities, n_bins=num_bins, pos_label=True)
    return [
        {
            "low": float(edges[index]),
            "high": float(edges[index + 1]),
            "mean_probability": float(mean_probability),
            "observed_rate": float(observed_rate),
            "count": int(counts[index]),
        }
        for index, observed_rate, mean_probability in zip(np.flatnonzero(counts), observed, mean, strict=True)
    ]


def expected_calibration_error(correct: np.ndarray, probabilities: np.ndarray, num_bins: int = NUM_BINS) -> float:
    """Mean gap between probability and observed rate over the bins, weighted by their counts (arXiv 1706.04599)."""
    bins = reliability_curve(correct, probabilities, num_bins)
    gaps = sum(b["count"] * abs(b["observed_rate"] - b["mean_probability"]) for b in bins)
    return float(gaps / len(probabilities))


def _resampled_ece(correct, probabilities, weights) -> np.ndarray:
    from scipy.sparse import csr_matrix

    n = len(probabilities)
    gaps = np.asarray(correct, dtype=float) - probabilities
    by_bin = csr_matrix((gaps, (_bins(probabilities, NUM_BINS), np.arange(n))), shape=(NUM_BINS, n))
    return _divide(np.abs(by_bin @ weights.T).sum(axis=0), weights.sum(axis=1))


def _confusion(labels, predictions, weights) -> np.ndarray:
    """Confusion matrices of shape `(num_resamples, k, k)`, labels first."""
    from scipy.sparse import csr_matrix

    k = int(max(labels.max(), predictions.max())) + 1
    n = len(labels)
    one_hot = csr_matrix((np.ones(n), (labels * k + predictions, np.arange(n))), shape=(k * k, n))
    return (one_hot @ weights.T).T.reshape(-1, k, k)


def _bins(probabilities, num_bins: int) -> np.ndarray:
    """Each probability's bin. Bins are closed on the right, as in scikit-learn."""
    return np.searchsorted(np.linspace(0, 1, num_bins + 1)[1:-1], np.asarray(probabilities, dtype=float))


def _divide(a, b) -> np.ndarray:
    """`a / b`, with NaN where `b` is 0."""
    a, b = np.broadcast_arrays(np.asarray(a, dtype=float), np.asarray(b, dtype=float))
    return np.divide(a, b, out=np.full(a.shape, np.nan), where=b != 0)
