"""Labels beside verdicts: what the safety head decides about labelled rows under a policy.

Measures, thresholds and plots are computed from a [`HeadOutcomes`].
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np
import torch

from safevlm.safety_labels import SafetyLabels
from safevlm.safety_policy import SafetyPolicy
from safevlm.safety_verdict import assess_logits, assess_rows
from safevlm.trainer.evaluation.bootstrap import image_groups
from safevlm.trainer.evaluation.eval_extra import require_head_packages

from .predictions import HeadPrediction

_ROWS_AT_ONCE = 500
"""Bounds the memory that verdicts on many rows take."""


@dataclass
class HeadOutcomes:
    """
    Labels and verdicts of rows that have both labels and an image. Arrays have the shape `(n,)` unless noted.

    Args:
        level_labels, category_labels (`np.ndarray` of `int`): The labels' ids.
        levels, categories (`np.ndarray` of `int`): The verdict after thresholds. A row below them has level 0 and the
            safe category.
        scores (`np.ndarray` of `float32`): The verdict's calibrated probability of any risk, in [0, 1].
        category_scores (`np.ndarray` of `float32`, shape `(n, num_categories)`): The score that each category's
            threshold is compared with: the highest of the readings whose most probable risky category it is; -1 if
            there is no such reading.
        category_confidence (`np.ndarray` of `float`): Probability of the most probable category, safe or risky.
        category_correct (`np.ndarray` of `bool`): Whether that category is the label.
        groups (`np.ndarray` of `int`): Rows with the same number share an image.
        sources (`np.ndarray` of `str`): The rows' sources.
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
        """Each row's highest score over its readings: a policy with one threshold flags the rows that reach it."""
        return self.category_scores.max(axis=1)

    @property
    def num_images(self) -> int:
        """Number of groups of rows that share an image, which is the number of independent samples."""
        return len(np.unique(self.groups))

    @property
    def has_risky_and_clean(self) -> bool:
        """Whether both kinds of rows occur; without both, no ROC curve is defined."""
        return bool(0 < self.risky.sum() < len(self))


def head_outcomes(predictions: Sequence[HeadPrediction], policy: SafetyPolicy, labels: SafetyLabels) -> HeadOutcomes:
    """The verdicts that `assess` gives under `policy` on the rows that have labels and an image, beside the labels."""
    require_head_packages()
    measurable = usable(predictions)
    chunks = [
        _verdicts(measurable[start : start + _ROWS_AT_ONCE], policy, labels)
        for start in range(0, len(measurable), _ROWS_AT_ONCE)
    ]
    verdicts = {name: np.concatenate([chunk[name] for chunk in chunks]) for name in chunks[0]}
    category_labels = np.array([prediction.category for prediction in measurable])
    return HeadOutcomes(
        level_labels=np.array([prediction.level for prediction in measurable]),
        category_labels=category_labels,
        category_correct=verdicts.pop("most_probable") == category_labels,
        groups=image_groups([prediction.images for prediction in measurable]),
        sources=np.array([prediction.source for prediction in measurable]),
        **verdicts,
    )


def usable(predictions: Sequence[HeadPrediction]) -> list[HeadPrediction]:
    """The predictions on rows with both labels and an image. Raises `ValueError` if there are none."""
    measurable = [p for p in predictions if p.assessed and p.level is not None and p.category is not None]
    if not measurable:
        raise ValueError(f"None of {len(predictions)} rows has both labels and an image to measure the head on.")
    return measurable


def readings(
    predictions: Sequence[HeadPrediction], labels: SafetyLabels, whole_conversation: bool = True
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """
    The rows' readings that count under a policy with this `whole_conversation`.

    Returns:
        Level logits, a `torch.FloatTensor` of shape `(num_readings, num_levels)`; category logits, a
        `torch.FloatTensor` of shape `(num_readings, num_categories)`; and the row that each reading belongs to, a
        `torch.LongTensor` of shape `(num_readings,)`.
    """
    level_logits, category_logits, rows = [], [], []
    for row, prediction in enumerate(predictions):
        for level, category, of_several_turns in zip(
            prediction.level_logits, prediction.category_logits, prediction.whole_conversation, strict=True
        ):
            if (len(level), len(category)) != (len(labels.level_names), len(labels.category_names)):
                raise ValueError(
                    f"row {prediction.row_id!r} has {len(level)} level and {len(category)} category logits, but the "
                    f"model has {len(labels.level_names)} levels and {len(labels.category_names)} categories: "
                    f"the predictions are another model's."
                )
            if whole_conversation or not of_several_turns:
                level_logits.append(level)
                category_logits.append(category)
                rows.append(row)
    return torch.tensor(level_logits), torch.tensor(category_logits), torch.tensor(rows)


def _verdicts(
    predictions: Sequence[HeadPrediction], policy: SafetyPolicy, labels: SafetyLabels
) -> dict[str, np.ndarray]:
    level_logits, category_logits, rows = readings(predictions, labels, policy.whole_conversation)
    verdict = assess_rows(level_logits, category_logits, rows, len(predictions), policy, labels)
    confidence, most_probable = verdict.category_probabilities.max(dim=-1)
    # With thresholds of 0, each reading's verdict names its most probable risky category.
    flag_all = policy.replace(risk_threshold=0.0, category_risk_thresholds={})
    reading_verdicts = assess_logits(level_logits, category_logits, flag_all, labels)
    category_scores = np.full((len(predictions), len(labels.category_names)), -1, np.float32)
    np.maximum.at(category_scores, (rows.numpy(), reading_verdicts.category.numpy()), reading_verdicts.score.numpy())
    return {
        "levels": verdict.level.numpy(),
        "categories": verdict.category.numpy(),
        "scores": verdict.score.numpy(),
        "category_scores": category_scores,
        "category_confidence": confidence.numpy(),
        "most_probable": most_probable.numpy(),
    }
