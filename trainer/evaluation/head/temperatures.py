"""Temperatures that calibrate the safety head's probabilities (Guo et al., arXiv 1706.04599).

They minimise the negative log-likelihood of the labels. A temperature never changes the order of two scores, nor which
category, or which level above 0, is the most probable.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch

from safevlm.safety_labels import SafetyLabels
from safevlm.safety_policy import TEMPERATURE_RANGE, SafetyPolicy
from safevlm.safety_verdict import level_log_probabilities, risk_logits

from .outcomes import readings, usable
from .predictions import HeadPrediction
from .thresholds import MIN_ROWS


def fit_temperatures(
    predictions: Sequence[HeadPrediction], policy: SafetyPolicy, labels: SafetyLabels, notes: list[str]
) -> SafetyPolicy:
    """`policy` with fitted temperatures. One that the rows do not determine stays as it is, and `notes` says so."""
    measurable = usable(predictions)
    level_logits, category_logits = _riskiest_readings(measurable, policy, labels)
    levels = torch.tensor([prediction.level for prediction in measurable])
    categories = torch.tensor([prediction.category for prediction in measurable])
    right_risk = (risk_logits(level_logits) > 0) == (levels > 0)
    right_level = torch.where(levels > 0, level_logits[:, 1:].argmax(dim=-1) + 1 == levels, True)
    fitted = {
        "level_temperature": _fit(
            "level_temperature",
            lambda temperature: level_log_probabilities(level_logits, temperature),
            levels,
            right_risk & right_level,
            policy,
            notes,
        ),
        "category_temperature": _fit(
            "category_temperature",
            lambda temperature: (category_logits / temperature).log_softmax(dim=-1),
            categories,
            category_logits.argmax(dim=-1) == categories,
            policy,
            notes,
        ),
    }
    return policy.replace(**fitted)


def fit_temperature(log_probabilities: Callable[[float], torch.Tensor], label_ids: torch.Tensor) -> float:
    """
    The temperature that minimises the negative log-likelihood of `label_ids`, within `TEMPERATURE_RANGE`.

    Args:
        log_probabilities (`Callable`): From a temperature to log probabilities of shape `(n, num_classes)`.
        label_ids (`torch.LongTensor` of shape `(n,)`): At least one of them is not the most probable class; otherwise
            there is no minimum.
    """
    from scipy.optimize import minimize_scalar

    def nll(log_temperature: float) -> float:  # convex in 1 / temperature, so it has one minimum
        return -float(log_probabilities(np.exp(log_temperature)).gather(1, label_ids.unsqueeze(1)).mean())

    minimum = minimize_scalar(nll, bounds=np.log(TEMPERATURE_RANGE), method="bounded", options={"xatol": 1e-6})
    return float(np.exp(minimum.x))


def _riskiest_readings(
    predictions: Sequence[HeadPrediction], policy: SafetyPolicy, labels: SafetyLabels
) -> tuple[torch.Tensor, torch.Tensor]:
    """Level and category logits of each row's riskiest reading. Which reading that is depends on no temperature."""
    level_logits, category_logits, rows = readings(predictions, labels, policy.whole_conversation)
    risk = risk_logits(level_logits.double())
    order = np.lexsort((-risk.numpy(), rows.numpy()))
    riskiest = order[np.unique(rows.numpy()[order], return_index=True)[1]]
    return level_logits[riskiest].double(), category_logits[riskiest].double()  # (n, num_levels), (n, num_categories)


def _fit(
    name: str,
    log_probabilities: Callable[[float], torch.Tensor],
    label_ids: torch.Tensor,
    right: torch.Tensor,
    policy: SafetyPolicy,
    notes: list[str],
) -> float:
    """One temperature, and notes on how far it can be trusted."""
    num_wrong = int((~right).sum())
    if not num_wrong:  # the likelihood has no maximum: it grows with confidence
        present = getattr(policy, name)
        notes.append(
            f"`{name}` stays {present:g}: the head is right on all {len(label_ids)} rows of the fit half, which says "
            f"nothing about how often it errs."
        )
        return present
    temperature = fit_temperature(log_probabilities, label_ids)
    if not TEMPERATURE_RANGE[0] * 1.01 < temperature < TEMPERATURE_RANGE[1] * 0.99:
        notes.append(
            f"`{name}` is at the edge of its range, {TEMPERATURE_RANGE}: on these rows the head's confidence says "
            f"little about whether it is right."
        )
    if num_wrong < MIN_ROWS:
        notes.append(f"`{name}` rests on the {num_wrong} of {len(label_ids)} rows that the head is wrong on.")
    return temperature
