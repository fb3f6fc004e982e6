"""Measures of the safety head: values by scikit-learn, and the same measures for many bootstrap resamples at once.

scikit-learn computes one weighting of the rows per call, a millisecond or more each; for intervals over thousands of
resamples the `resampled_...` functions here compute all of them from cumulative sums and confusion matrices. Tests
hold them equal to scikit-learn's. What is not defined (AUROC with one class only) is `None`, in resamples NaN.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np

from safevlm.safety_policy import SafetyPolicy
from safevlm.safety_verdict import assess_logits, assess_rows
from safevlm.trainer.evaluation.bootstrap import image_groups

from .metrics import auroc, macro_f1, require_sklearn
from .predictions import HeadPrediction

NUM_BINS = 10
"""Bins of equal width for reliability and ECE."""
SENSITIVITY = 0.95  # FPR is taken at this true-positive rate


@dataclass
class HeadOutcomes:
    """
    Labels, and verdicts under a policy, of the labelled rows with an image. All arrays have the shape `(n,)` but one.

    Args:
        level_labels, category_labels (`int`)
        levels, categories (`int`): The verdict, after thresholds: below them a row is of level 0 and safe.
        scores (`float32`): The verdict's calibrated probability of any risk, in [0, 1].
        category_scores (`float32` of shape `(n, num_categories)`): The highest score among the row's readings whose
            most probable risky category this is, so whose threshold applies; -1 where there is none.
        category_confidence (`float`), category_correct (`bool`): Of the most probable category, safe or risky.
        groups (`int`): Rows with the same number share an image.
        sources (`str`)
    """

    level_labels: np.ndarray
    category_labels: np.ndarray
    levels: np.ndarray
    categories: np.ndarray
    scores: np.ndarray
    category_scores: np.ndarray
    category_confidence: np.ndarray
    category_correct: np.ndarray
    groups: np.ndarray
    sources: np.ndarray

    def __len__(self) -> int:
        return len(self.scores)

    def __getitem__(self, rows) -> HeadOutcomes:
        return HeadOutcomes(**{field.name: getattr(self, field.name)[rows] for field in fields(self)})

    @property
    def risky(self) -> np.ndarray:
        """Rows labelled with a level above the first."""
        return self.level_labels > 0

    @property
    def flagged(self) -> np.ndarray:
        """Rows that the policy counts as risky."""
        return self.levels > 0

    @property
    def highest_scores(self) -> np.ndarray:
        """Of all readings of a row: a policy with one threshold flags what reaches it."""
        return self.category_scores.max(axis=1)

    @property
    def num_images(self) -> int:
        """Groups of rows that share an image: the number of independent samples."""
        return len(np.unique(self.groups))


def require_eval_extra():
    """Raises an `ImportError` that names the extra to install, before anything expensive has run."""
    require_sklearn()
    if importlib.util.find_spec("matplotlib") is None:
        raise ImportError("Plots of the safety head need matplotlib: pip install 'safevlm[eval]'.")


def usable(predictions: Sequence[HeadPrediction]) -> list[HeadPrediction]:
    """Those with both labels and an image. Raises if there are none."""
    chosen = [p for p in predictions if p.assessed and p.level is not None and p.category is not None]
    if not chosen:
        raise ValueError(f"None of {len(predictions)} rows has both labels and an image to measure the head on.")
    return chosen


def readings(predictions: Sequence[HeadPrediction], labels, whole_conversation: bool = True):
    """
    All that the head says about the rows under policies with this `whole_conversation`.

    Returns:
        Level and category logits, `torch.FloatTensor`s of shapes `(num_readings, num_levels)` and `(num_readings,
        num_categories)`, and the row that each belongs to, a `torch.LongTensor` of shape `(num_readings,)`.
    """
    import torch

    levels, categories, rows = [], [], []
    for i, prediction in enumerate(predictions):
        for level, category, of_several_turns in zip(
            prediction.level_logits, prediction.category_logits, prediction.whole_conversation, strict=True
        ):
            if (len(level), len(category)) != (len(labels.level_names), len(labels.category_names)):
                raise ValueError(
                    f"row {prediction.row_id!r} has {len(level)} level and {len(category)} category logits, the "
                    f"model has {len(labels.level_names)} levels and {len(labels.category_names)} categories: "
                    f"the predictions are another model's."
                )
            if whole_conversation or not of_several_turns:
                levels.append(level)
                categories.append(category)
                rows.append(i)
    return torch.tensor(levels), torch.tensor(categories), torch.tensor(rows)


def head_outcomes(predictions: Sequence[HeadPrediction], policy: SafetyPolicy, labels) -> HeadOutcomes:
    """The verdicts that `assess` gives under `policy`, beside the labels; of rows with labels and image."""
    require_eval_extra()
    chosen = usable(predictions)
    chunks = [_verdicts(chosen[i : i + 500], policy, labels) for i in range(0, len(chosen), 500)]  # bounds the memory
    verdicts = {name: np.concatenate([chunk[name] for chunk in chunks]) for name in chunks[0]}
    category_labels = np.array([p.category for p in chosen])
    return HeadOutcomes(
        level_labels=np.array([p.level for p in chosen]),
        category_labels=category_labels,
        category_correct=verdicts.pop("most_probable") == category_labels,
        groups=image_groups([p.images for p in chosen]),
        sources=np.array([p.source for p in chosen]),
        **verdicts,
    )


def _verdicts(predictions: Sequence[HeadPrediction], policy: SafetyPolicy, labels) -> dict[str, np.ndarray]:

    level_logits, category_logits, rows = readings(predictions, labels, policy.whole_conversation)
    verdict = assess_rows(level_logits, category_logits, rows, len(predictions), policy, labels)
    confidence, most_probable = verdict.category_probabilities.max(dim=-1)
    flag_all = policy.replace(risk_threshold=0.0, category_risk_thresholds={})  # each reading's risky category shows
    each = assess_logits(level_logits, category_logits, flag_all, labels)
    category_scores = np.full((len(predictions), len(labels.category_names)), -1, np.float32)
    np.maximum.at(category_scores, (rows.numpy(), each.category.numpy()), each.score.numpy())
    return {
        "levels": verdict.level.numpy(),
        "categories": verdict.category.numpy(),
        "scores": verdict.score.numpy(),
        "category_scores": category_scores,
        "category_confidence": confidence.numpy(),
        "most_probable": most_probable.numpy(),
    }


# -- values, by scikit-learn -----------------------------------------------------------------------------------------


def label_measures(outcomes: HeadOutcomes) -> dict[str, float | None]:
    """`category_macro_f1` over the categories that occur, `level_accuracy`, `level_kappa`, `category_ece`."""
    from sklearn.metrics import cohen_kappa_score

    kappa = None
    if len(np.union1d(outcomes.level_labels, outcomes.levels)) > 1:
        ids = np.arange(max(outcomes.level_labels.max(), outcomes.levels.max()) + 1)  # or distances would skip levels
        kappa = float(cohen_kappa_score(outcomes.level_labels, outcomes.levels, labels=ids, weights="quadratic"))
    return {
        "category_macro_f1": macro_f1(outcomes.category_labels, outcomes.categories),
        "level_accuracy": float((outcomes.level_labels == outcomes.levels).mean()),
        "level_kappa": kappa,
        "category_ece": expected_calibration_error(outcomes.category_correct, outcomes.category_confidence),
    }


def risk_measures(outcomes: HeadOutcomes) -> dict[str, float | None]:
    """
    `auroc`, `auprc`, `fpr_at_95_tpr` and `ece` of the score for "level above 0"; and, at the policy's thresholds,
    `recall` (share of risky rows flagged) and `false_positive_rate` (share of clean rows flagged).
    """
    from sklearn.metrics import average_precision_score, roc_curve

    risky, scores = outcomes.risky, outcomes.scores
    both = 0 < risky.sum() < len(risky)
    fpr_at_tpr = None
    if both:
        fpr, tpr, _ = roc_curve(risky, scores, drop_intermediate=False)
        fpr_at_tpr = float(fpr[tpr >= SENSITIVITY].min())
    return {
        "auroc": auroc(risky, scores),
        "auprc": float(average_precision_score(risky, scores)) if both else None,
        "fpr_at_95_tpr": fpr_at_tpr,
        "ece": expected_calibration_error(risky, scores),
        "recall": float(outcomes.flagged[risky].mean()) if risky.any() else None,
        "false_positive_rate": float(outcomes.flagged[~risky].mean()) if not risky.all() else None,
    }


def category_measures(outcomes: HeadOutcomes, category: int) -> dict[str, float | None]:
    """`precision`, `recall_of_category` and `f1` of one category's verdicts, against all others."""
    from sklearn.metrics import precision_recall_fscore_support

    precision, recall, f1, _ = precision_recall_fscore_support(
        outcomes.category_labels == category, outcomes.categories == category, average="binary", zero_division=np.nan
    )
    values = {"precision": precision, "recall_of_category": recall, "f1": f1}
    return {name: None if np.isnan(value) else float(value) for name, value in values.items()}


def reliability_curve(correct: np.ndarray, probabilities: np.ndarray, num_bins: int = NUM_BINS) -> list[dict]:
    """
    How often the event happens where its probability is said to be so much.

    Returns:
        One dict per non-empty bin of equal width: `low`, `high`, `mean_probability`, `observed_rate` (all in [0, 1])
        and `count`.
    """
    from sklearn.calibration import calibration_curve

    # As in scikit-learn: bins are closed on the right.
    edges = np.linspace(0, 1, num_bins + 1)
    counts = np.bincount(_bins(probabilities, num_bins), minlength=num_bins)
    probabilities = np.clip(np.asarray(probabilities, dtype=float), 0, 1)
    observed, mean = calibration_curve(np.asarray(correct, dtype=bool), probabilities, n_bins=num_bins, pos_label=True)
    return [
        {
            "low": float(edges[b]),
            "high": float(edges[b + 1]),
            "mean_probability": float(m),
            "observed_rate": float(o),
            "count": int(counts[b]),
        }
        for b, o, m in zip(np.flatnonzero(counts), observed, mean, strict=True)
    ]


def expected_calibration_error(correct: np.ndarray, probabilities: np.ndarray, num_bins: int = NUM_BINS) -> float:
    """Mean gap between probability and observed rate over the bins, weighted by their counts (arXiv 1706.04599)."""
    bins = reliability_curve(correct, probabilities, num_bins)
    gaps = sum(b["count"] * abs(b["observed_rate"] - b["mean_probability"]) for b in bins)
    return float(gaps / len(probabilities))


# -- the same, for many resamples ------------------------------------------------------------------------------------
# `weights` of shape `(num_resamples, n)` says how often each row occurs; results have the shape `(num_resamples,)`.


def resampled_label_measures(outcomes: HeadOutcomes, weights: np.ndarray) -> dict[str, np.ndarray]:
    total = weights.sum(axis=1)
    levels = _confusion(outcomes.level_labels, outcomes.levels, weights)
    categories = _confusion(outcomes.category_labels, outcomes.categories, weights)
    true, given, right = categories.sum(axis=2), categories.sum(axis=1), np.einsum("rcc->rc", categories)
    occurs = true > 0
    f1 = _divide(2 * right, true + given)
    distance = np.subtract.outer(np.arange(levels.shape[1]), np.arange(levels.shape[1])) ** 2
    by_chance = np.einsum("ri,rj,ij->r", levels.sum(axis=2), levels.sum(axis=1), distance)
    return {
        "category_macro_f1": _divide(np.where(occurs, f1, 0.0).sum(axis=1), occurs.sum(axis=1)),
        "level_accuracy": _divide(np.einsum("rcc->r", levels), total),
        "level_kappa": 1 - _divide(np.einsum("rij,ij->r", levels, distance) * total, by_chance),
        "category_ece": _resampled_ece(outcomes.category_correct, outcomes.category_confidence, weights),
    }


def resampled_risk_measures(outcomes: HeadOutcomes, weights: np.ndarray) -> dict[str, np.ndarray]:
    risky, scores = outcomes.risky, outcomes.scores
    order = np.argsort(-scores, kind="stable")
    last = np.flatnonzero(np.append(np.diff(scores[order]) != 0, True))  # ties count as one threshold
    true = np.cumsum((weights * risky)[:, order], axis=1)[:, last]
    false = np.cumsum((weights * ~risky)[:, order], axis=1)[:, last]
    num_risky, num_clean = true[:, -1], false[:, -1]
    tpr, fpr = _divide(true, num_risky[:, None]), _divide(false, num_clean[:, None])
    both = (num_risky > 0) & (num_clean > 0)
    higher = np.pad(tpr, ((0, 0), (1, 0)))[:, :-1]
    precision = np.nan_to_num(_divide(true, true + false))
    at = np.argmax(tpr >= SENSITIVITY, axis=1)
    curves = {
        "auroc": (np.diff(fpr, axis=1, prepend=0) * (tpr + higher) / 2).sum(axis=1),
        "auprc": ((tpr - higher) * precision).sum(axis=1),
        "fpr_at_95_tpr": fpr[np.arange(len(fpr)), at],
    }
    return {
        **{name: np.where(both, values, np.nan) for name, values in curves.items()},
        "ece": _resampled_ece(risky, scores, weights),
        "recall": _divide(weights @ (risky & outcomes.flagged), num_risky),
        "false_positive_rate": _divide(weights @ (~risky & outcomes.flagged), num_clean),
    }


def resampled_category_measures(outcomes: HeadOutcomes, category: int, weights: np.ndarray) -> dict[str, np.ndarray]:
    labelled, given = outcomes.category_labels == category, outcomes.categories == category
    right, true, said = weights @ (labelled & given), weights @ labelled, weights @ given
    return {
        "precision": _divide(right, said),
        "recall_of_category": _divide(right, true),
        "f1": _divide(2 * right, true + said),
    }


def _confusion(labels, predictions, weights) -> np.ndarray:
    """Confusion matrices of shape `(num_resamples, k, k)`, labels first."""
    from scipy.sparse import csr_matrix

    k = int(max(labels.max(), predictions.max())) + 1
    n = len(labels)
    one_hot = csr_matrix((np.ones(n), (labels * k + predictions, np.arange(n))), shape=(k * k, n))
    return (one_hot @ weights.T).T.reshape(-1, k, k)


def _resampled_ece(correct, probabilities, weights) -> np.ndarray:
    from scipy.sparse import csr_matrix

    n = len(probabilities)
    gaps = np.asarray(correct, dtype=float) - probabilities
    by_bin = csr_matrix((gaps, (_bins(probabilities, NUM_BINS), np.arange(n))), shape=(NUM_BINS, n))
    return _divide(np.abs(by_bin @ weights.T).sum(axis=0), weights.sum(axis=1))


def _bins(probabilities, num_bins: int) -> np.ndarray:
    return np.searchsorted(np.linspace(0, 1, num_bins + 1)[1:-1], np.asarray(probabilities, dtype=float))


def _divide(a, b) -> np.ndarray:
    """NaN where `b` is 0."""
    a, b = np.broadcast_arrays(np.asarray(a, dtype=float), np.asarray(b, dtype=float))
    return np.divide(a, b, out=np.full(a.shape, np.nan), where=b != 0)
