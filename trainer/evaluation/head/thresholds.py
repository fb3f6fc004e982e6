"""Thresholds of a policy for a wanted false-positive rate or cost, on rows whose labels and scores are known.

A row is flagged when one of its readings (of an image, of its turns) reaches the threshold of its most probable risky
category, as in `assess`.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from safevlm.safety_labels import SafetyLabels
from safevlm.safety_policy import SafetyPolicy

from .measures import HeadOutcomes, head_outcomes
from .predictions import HeadPrediction

MIN_ROWS = 20
"""A category needs this many rows (clean ones; with a cost ratio, risky ones, too) for a threshold of its own."""


def fit_thresholds(
    predictions: Sequence[HeadPrediction],
    policy: SafetyPolicy,
    labels: SafetyLabels,
    target_fpr: float | None = None,
    cost_ratio: float | None = None,
    notes: list[str] | None = None,
) -> tuple[SafetyPolicy, dict]:
    """
    Fits `risk_threshold` on all rows and a threshold for each category that enough rows count in.

    A row counts in each category that is the most probable of one of its readings, with the highest score of those.
    With `target_fpr` it is a threshold of the highest recall that flags at most this share of the clean rows, per
    category and in all: the global threshold is raised where the categories without their own would break the total.
    Of several it is the nearest to the policy's present one, so that no clean row is flagged for nothing. With
    `cost_ratio` it is a threshold of least cost; of several, the nearest to the one that is right for calibrated
    scores, 1 / (1 + cost_ratio).

    Returns:
        The policy; and the `global` threshold and per category its threshold, whether that is its `own`, and how many
        `clean` and `risky` rows count in it.
    """
    notes = [] if notes is None else notes
    check_aim(target_fpr, cost_ratio)
    outcomes = head_outcomes(predictions, policy, labels)
    risky, highest = outcomes.risky, outcomes.highest_scores
    if target_fpr is None:
        needed = {"clean": MIN_ROWS, "risky": MIN_ROWS}
    else:
        # With fewer than 1 / target_fpr clean rows, none of them may be flagged, and the threshold is but a guess.
        needed = {"clean": max(MIN_ROWS, int(np.ceil(min(1 / target_fpr, 1e9))) if target_fpr else 0)}

    own, about, limits = {}, {}, {}
    for category, name in enumerate(labels.category_names):
        if category == labels.safe_category_id:
            continue
        scores = outcomes.category_scores[:, category]
        mine = scores >= 0
        counts = {"clean": int((mine & ~risky).sum()), "risky": int((mine & risky).sum())}
        about[name] = counts
        if short := [f"{counts[kind]} {kind}" for kind, least in needed.items() if counts[kind] < least]:
            notes.append(
                f"{name!r} has too few rows for a threshold of its own ({' and '.join(short)}; "
                f"{' and '.join(f'{least} {kind}' for kind, least in needed.items())} needed): the global one applies."
            )
        elif target_fpr is None:
            own[name] = _cheapest_threshold(scores[mine], risky[mine], cost_ratio)
        else:
            limits[name] = scores[mine], risky[mine], _allowed(counts["clean"], target_fpr)

    if target_fpr is None:
        threshold = _cheapest_threshold(highest, risky, cost_ratio)
        own = _if_cheaper(own, threshold, outcomes, labels, cost_ratio, notes)
    else:
        allowed = _allowed(int((~risky).sum()), target_fpr)
        own, threshold = _thresholds_within(allowed, limits, outcomes, policy, labels)
    fitted = policy.replace(risk_threshold=threshold, category_risk_thresholds=own)
    if target_fpr is not None:
        achieved = head_outcomes(predictions, fitted, labels).flagged[~risky]
        if achieved.sum() > _allowed(len(achieved), target_fpr):
            notes.append(
                f"The aim of {target_fpr:.2%} is out of reach: {achieved.mean():.2%} of {len(achieved)} clean rows "
                f"have a score of 1 in float32, which every threshold flags."
            )
    for name, counts in about.items():
        about[name] = {"threshold": own.get(name, threshold), "own": name in own, **counts}
    return fitted, {"global": threshold, "categories": about}


def _thresholds_within(
    allowed: int, limits: dict[str, tuple], outcomes: HeadOutcomes, policy: SafetyPolicy, labels: SafetyLabels
) -> tuple[dict[str, float], float]:
    """
    Thresholds of categories and the global one that together flag at most `allowed` clean rows.

    Args:
        limits (`dict[str, tuple]`): Per category its rows' scores, which of them are risky, and how many of the clean
            ones may be flagged.
    """
    risky, own = outcomes.risky, {}
    # Each within its limit is all within theirs, but for rows that count in several categories, and scores of 1, which
    # every threshold flags: then all make up for it.
    for less in range(max((limit for *_, limit in limits.values()), default=-1) + 1):
        for name, (scores, are_risky, limit) in limits.items():
            present = policy.category_risk_thresholds.get(name, policy.risk_threshold)
            own[name] = _threshold_within(max(limit - less, 0), scores, are_risky, present)
        if (_flagged(outcomes, own, labels) & ~risky).sum() <= allowed:
            break
    threshold = _threshold_within(allowed, outcomes.highest_scores, risky, policy.risk_threshold)
    flagged = _flagged(outcomes, own, labels)
    others = [name not in own for name in labels.category_names]
    scores = outcomes.category_scores[:, others].max(axis=1)
    rest = (scores >= 0) & ~flagged
    left_over = max(allowed - int((flagged & ~risky).sum()), 0)
    return own, max(threshold, _lowest_threshold(left_over, scores[rest], risky[rest]))


def check_aim(target_fpr: float | None, cost_ratio: float | None):
    """Raises unless exactly one aim is given and in range."""
    if (target_fpr is None) == (cost_ratio is None):
        raise ValueError(f"Give one of `target_fpr` and `cost_ratio`, got {target_fpr!r} and {cost_ratio!r}.")
    if target_fpr is not None and not 0 <= target_fpr < 1:
        raise ValueError(f"`target_fpr` must be in [0, 1), got {target_fpr!r}.")
    if cost_ratio is not None and not 0 < cost_ratio < np.inf:
        raise ValueError(f"`cost_ratio` must be a number above 0, got {cost_ratio!r}.")


def _allowed(count: int, target: float) -> int:
    """The largest number of `count` rows whose share is at most `target`."""
    allowed = int(count * target + 1e-9)
    return allowed if allowed <= target * count or allowed / count <= target else allowed - 1


def _flagged(outcomes: HeadOutcomes, thresholds: dict[str, float], labels: SafetyLabels) -> np.ndarray:
    """Which rows reach the threshold of a category; categories without one flag nothing."""
    of_category = np.array([thresholds.get(name, np.inf) for name in labels.category_names], np.float32)
    return (outcomes.category_scores >= of_category).any(axis=1)


def _if_cheaper(
    own: dict[str, float],
    threshold: float,
    outcomes: HeadOutcomes,
    labels: SafetyLabels,
    cost_ratio: float,
    notes: list[str],
) -> dict[str, float]:
    """
    `own`, or nothing where one threshold for all costs less: categories are fitted apart, and rows with readings of
    several count in each.
    """
    risky, costs = outcomes.risky, []
    for thresholds in (own, {}):
        of_category = {name: thresholds.get(name, threshold) for name in labels.category_names}
        flagged = _flagged(outcomes, of_category, labels)
        costs.append((flagged & ~risky).sum() + cost_ratio * (~flagged & risky).sum())
    if costs[0] <= costs[1] * (1 + 1e-12):
        return own
    notes.append("One threshold for all categories costs less than one for each: the global one applies to all.")
    return {}


def _threshold_within(allowed: int, scores: np.ndarray, risky: np.ndarray, present: float) -> float:
    """
    Of the thresholds that flag at most `allowed` clean rows, and under this limit the most risky ones, the nearest to
    `present`.
    """
    lowest = _lowest_threshold(allowed, scores, risky)
    caught = scores[risky & (scores >= np.float32(lowest))]
    if not len(caught) or np.float32(present) <= caught.min():
        return max(lowest, present)
    values = np.unique(scores)
    before = np.searchsorted(values, caught.min()) - 1  # half-way to the next lower score, not at the very row
    return lowest if before < 0 else max(lowest, float(_just_above(values)[before]))


def _lowest_threshold(allowed: int, scores: np.ndarray, risky: np.ndarray) -> float:
    """The lowest threshold (within the gap between two scores) that flags at most `allowed` clean rows, or 1."""
    clean = np.sort(scores[~risky])[::-1]
    if allowed >= len(clean):
        return 0.0
    values = np.unique(scores)
    return float(_just_above(values)[np.searchsorted(values, clean[allowed])])


def _cheapest_threshold(scores: np.ndarray, risky: np.ndarray, cost_ratio: float) -> float:
    """The threshold of least cost; of several, the nearest to 1 / (1 + cost_ratio)."""
    ideal = 1 / (1 + cost_ratio)
    candidates = np.array([0.0, ideal, *_just_above(np.unique(scores)).tolist()])
    compared = candidates.astype(np.float32)  # as assess_logits does
    missed = np.searchsorted(np.sort(scores[risky]), compared)
    flagged = (~risky).sum() - np.searchsorted(np.sort(scores[~risky]), compared)
    cost = flagged + cost_ratio * missed
    cheapest = candidates[cost <= cost.min() * (1 + 1e-12)]
    return float(cheapest[np.argmin(np.abs(cheapest - ideal))])


def _just_above(values: np.ndarray) -> np.ndarray:
    """
    For each of the sorted scores a threshold that it does not reach but the next does: half-way between them, so that
    rounding does not matter. A score of 1 reaches every threshold.
    """
    following = np.append(values[1:], np.float32(1))
    middle = ((values.astype(float) + following) / 2).astype(np.float32)
    return np.where(middle > values, middle, following)
