"""How good the safety head's verdicts are. Pure functions over arrays; the measures themselves are scikit-learn's."""

import importlib.util

import numpy as np


def head_metrics(
    level_labels, level_predictions, category_labels, category_predictions, scores
) -> dict[str, float | int | None]:
    """
    Args:
        level_labels, level_predictions, category_labels, category_predictions (int arrays of shape `(n,)`)
        scores (float array of shape `(n,)`): Probability of any risk, in [0, 1].

    Returns:
        `category_macro_f1` (over the categories that occur), `level_accuracy`, `auroc` of `scores` for "level above 0"
        (`None` if only one of the two occurs), all in [0, 1]; and `num_assessed`, the number of rows.
    """
    require_sklearn()
    level_labels, category_labels = np.asarray(level_labels), np.asarray(category_labels)
    if not len(level_labels):
        raise ValueError("No labelled row with an image to evaluate the safety head on.")
    return {
        "category_macro_f1": macro_f1(category_labels, category_predictions),
        "level_accuracy": float((level_labels == level_predictions).mean()),
        "auroc": auroc(level_labels > 0, scores),
        "num_assessed": len(level_labels),
    }


def macro_f1(labels: np.ndarray, predictions: np.ndarray) -> float:
    """Mean F1 of the classes that occur in `labels`."""
    from sklearn.metrics import f1_score

    return float(f1_score(labels, predictions, labels=np.unique(labels), average="macro", zero_division=0))


def auroc(risky: np.ndarray, scores: np.ndarray) -> float | None:
    """Area under the ROC curve; `None` if only one of risky and clean rows occurs."""
    from sklearn.metrics import roc_auc_score

    return float(roc_auc_score(risky, scores)) if 0 < risky.sum() < len(risky) else None


def require_sklearn():
    """Raises an `ImportError` that names the extra to install."""
    if importlib.util.find_spec("sklearn") is None:
        raise ImportError("Measures of the safety head need scikit-learn: pip install 'safevlm[eval]'.")


def trainer_metrics(prediction) -> dict[str, float]:
    """
    `compute_metrics` for [`SafeVlmTrainer`]: the head's plain arg max, before any policy.

    Rows without labels or without an image are left out.
    """
    level_logits, category_logits, assessed = (_column(prediction.predictions, i) for i in range(3))
    level_labels, category_labels = (_column(prediction.label_ids, i) for i in (1, 2))
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


def _column(parts, index: int) -> np.ndarray:
    """One of the Trainer's arrays, over all rows; with `eval_do_concat_batches=False` it gives a list of batches."""
    return np.concatenate([batch[index] for batch in parts]) if isinstance(parts, list) else parts[index]
