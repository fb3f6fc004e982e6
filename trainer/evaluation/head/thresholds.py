"""Thresholds of a policy for a wanted false-positive rate or cost, from rows with known labels and scores.

As in `assess`, a row is flagged when one of its readings (of an image, of its turns) reaches the threshold of that
reading's most probable risky category.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from safevlm.safety_labels import SafetyLabels
from safevlm.safety_policy import SafetyPolicy

from .outcomes import HeadOutcomes, head_outcomes
from .predictions import HeadPrediction

MIN_ROWS = 20
"""A category needs this many clean rows, and with a cost ratio also risky ones, for a threshold of its own."""


def fit_thresholds(
    predictions: Sequence[HeadPrediction],
    policy: SafetyPolicy,
    labels: SafetyLabels,
    target_fpr: float | None = None,
    cost_ratio: float | None = None,
    notes: list[str] | None = None,
) -> tuple[SafetyPolicy, dict]:
    """
    Fits `risk_threshold` on all rows, and a threshold for each category that has enough rows.

    A row counts in each category that is the most probable risky one of any of its readings, with the highest score of
    those readings.

    With `target_fpr`, the thresholds give the highest recall that flags at most this share of the clean rows, per
    category and overall; the global threshold is raised where categories without a threshold of their own would exceed
    the overall share. Among equal thresholds the one nearest to the policy's present one is taken, so that no clean
    row is flagged for nothing. With `cost_ratio`, they give the lowest cost; among equal ones, the nearest to the
    optimum for calibrated scores, 1 / (1 + cost_ratio).

    Args:
        notes (`list[str]`, *optional*): Warnings are appended to it.

    Returns:
        The policy; and a `dict` with the `global` threshold and, under `categories`, each category's `threshold`,
        whether it is the category's `own`, and its number of `clean` and `risky` rows.
    """
    notes = [] if notes is None else notes
    check_aim(target_fpr, cost_ratio)
    outcomes = head_outcomes(predictions, policy, labels)
    all_rows = _ScoredRows(outcomes.highest_scores, outcomes.risky)
    by_category = {
        name: _ScoredRows.of_category(outcomes, category)
        for category, name in enumerate(labels.category_names)
        if category != labels.safe_category_id
    }
    enough_rows = _with_enough_rows(by_category, target_fpr, notes)
    if target_fpr is None:
        threshold = all_rows.cheapest_threshold(cost_ratio)
        own_thresholds = {name: rows.cheapest_threshold(cost_ratio) for name, rows in enough_rows.items()}
        own_thresholds = _own_if_cheaper(own_thresholds, threshold, outcomes, labels, cost_ratio, notes)
    else:
        own_thresholds, threshold = _thresholds_within(target_fpr, all_rows, enough_rows, outcomes, policy, labels)
    fitted = policy.replace(risk_threshold=threshold, category_risk_thresholds=own_thresholds)
    if target_fpr is not None:
        flagged = head_outcomes(predictions, fitted, labels).flagged[~outcomes.risky]
        if flagged.sum() > _allowed(len(flagged), target_fpr):
            notes.append(
                f"The aim of {target_fpr:.2%} is out of reach: {flagged.mean():.2%} of {len(flagged)} clean rows "
                f"have a score of 1 in float32, which every threshold flags."
            )
    categories = {
        name: {"threshold": own_thresholds.get(name, threshold), "own": name in own_thresholds, **rows.counts()}
        for name, rows in by_category.items()
    }
    return fitted, {"global": threshold, "categories": categories}


def check_aim(target_fpr: float | None, cost_ratio: float | None):
    """Raises `ValueError` unless exactly one aim is given and in range."""
    if (target_fpr is None) == (cost_ratio is None):
        raise ValueError(f"Give one of `target_fpr` and `cost_ratio`, got {target_fpr!r} and {cost_ratio!r}.")
    if target_fpr is not None and not 0 <= target_fpr < 1:
        raise ValueError(f"`target_fpr` must be in [0, 1), got {target_fpr!r}.")
    if cost_ratio is not None and not 0 < cost_ratio < np.inf:
        raise ValueError(f"`cost_ratio` must be a number above 0, got {cost_ratio!r}.")


@dataclass(frozen=True)
class _ScoredRows:
    """
    Args:
        scores (`np.ndarray` of `float32`, shape `(n,)`): What thresholds are compared with.
        risky (`np.ndarray` of `bool`, shape `(n,)`): Whether the rows are labelled risky.
    """

    scores: np.ndarray
    risky: np.ndarray

    @classmethod
    def of_category(cls, outcomes: HeadOutcomes, category: int) -> _ScoredRows:
        """The rows that count in a category."""
        scores = outcomes.category_scores[:, category]
        return cls(scores[scores >= 0], outcomes.risky[scores >= 0])

    def counts(self) -> dict[str, int]:
        return {"clean": int((~self.risky).sum()), "risky": int(self.risky.sum())}

    def lowest_threshold(self, allowed: int) -> float:
        """The lowest threshold (within the gap between two scores) that flags at most `allowed` clean rows, or 1."""
        clean = np.sort(self.scores[~self.risky])[::-1]
        if allowed >= len(clean):
            return 0.0
        values = np.unique(self.scores)
        return float(_just_above(values)[np.searchsorted(values, clean[allowed])])

    def nearest_threshold(self, allowed: int, present: float) -> float:
        """
        Among the thresholds that flag at most `allowed` clean rows and, under this limit, the most risky ones, the
        nearest to `present`.
        """
        lowest = self.lowest_threshold(allowed)
        caught = self.scores[self.risky & (self.scores >= np.float32(lowest))]
        if not len(caught) or np.float32(present) <= caught.min():
            return max(lowest, present)
        values = np.unique(self.scores)
        before = np.searchsorted(values, caught.min()) - 1  # half-way to the next lower score, not at the row itself
        return lowest if before < 0 else max(lowest, float(_just_above(values)[before]))

    def cheapest_threshold(self, cost_ratio: float) -> float:
        """The threshold of lowest cost; among equal ones, the nearest to 1 / (1 + cost_ratio)."""
        ideal = 1 / (1 + cost_ratio)
        candidates = np.array([0.0, ideal, *_just_above(np.unique(self.scores)).tolist()])
        compared = candidates.astype(np.float32)  # as assess_logits does
        missed = np.searchsorted(np.sort(self.scores[self.risky]), compared)
        flagged = (~self.risky).sum() - np.searchsorted(np.sort(self.scores[~self.risky]), compared)
        cost = flagged + cost_ratio * missed
        cheapest = candidates[cost <= cost.min() * (1 + 1e-12)]
        return float(cheapest[np.argmin(np.abs(cheapest - ideal))])


def _with_enough_rows(
    by_category: dict[str, _ScoredRows], target_fpr: float | None, notes: list[str]
) -> dict[str, _ScoredRows]:
    """The categories with enough rows for a threshold of their own; `notes` lists the others."""
    if target_fpr is None:
        needed = {"clean": MIN_ROWS, "risky": MIN_ROWS}
    else:
        # With fewer than 1 / target_fpr clean rows none of them may be flagged, and the threshold is a mere guess.
        needed = {"clean": max(MIN_ROWS, int(np.ceil(min(1 / target_fpr, 1e9))) if target_fpr else 0)}
    enough = {}
    for name, rows in by_category.items():
        counts = rows.counts()
        if too_few := [kind for kind, least in needed.items() if counts[kind] < least]:
            notes.append(
                f"{name!r} has too few rows for a threshold of its own "
                f"({' and '.join(f'{counts[kind]} {kind}' for kind in too_few)}; "
                f"{' and '.join(f'{least} {kind}' for kind, least in needed.items())} needed): the global one applies."
            )
        else:
            enough[name] = rows
    return enough


def _thresholds_within(
    target_fpr: float,
    all_rows: _ScoredRows,
    by_category: dict[str, _ScoredRows],
    outcomes: HeadOutcomes,
    policy: SafetyPolicy,
    labels: SafetyLabels,
) -> tuple[dict[str, float], float]:
    """Thresholds of the categories, and the global one, that together flag at most `target_fpr` of the clean rows."""
    allowed = _allowed(all_rows.counts()["clean"], target_fpr)
    limits = {name: _allowed(rows.counts()["clean"], target_fpr) for name, rows in by_category.items()}
    own_thresholds: dict[str, float] = {}
    highest = dict.fromkeys(labels.category_names, 1.0)  # of categories without a threshold of their own
    # If each category keeps its limit, the total is kept, too, with two exceptions: rows that count in several
    # categories, and scores of 1, which every threshold flags. Then all limits are lowered together.
    for fewer in range(max(limits.values(), default=-1) + 1):
        for name, rows in by_category.items():
            present = policy.category_risk_thresholds.get(name, policy.risk_threshold)
            own_thresholds[name] = rows.nearest_threshold(max(limits[name] - fewer, 0), present)
        if (_flagged(outcomes, {**highest, **own_thresholds}, labels) & ~outcomes.risky).sum() <= allowed:
            break
    flagged = _flagged(outcomes, own_thresholds, labels)
    without_own = [name not in own_thresholds for name in labels.category_names]
    scores = outcomes.category_scores[:, without_own].max(axis=1)
    undecided = (scores >= 0) & ~flagged
    still_allowed = max(allowed - int((flagged & ~outcomes.risky).sum()), 0)
    for_the_rest = _ScoredRows(scores[undecided], outcomes.risky[undecided]).lowest_threshold(still_allowed)
    return own_thresholds, max(all_rows.nearest_threshold(allowed, policy.risk_threshold), for_the_rest)


def _own_if_cheaper(
    own_thresholds: dict[str, float],
    threshold: float,
    outcomes: HeadOutcomes,
    labels: SafetyLabels,
    cost_ratio: float,
    notes: list[str],
) -> dict[str, float]:
    """
    `own_thresholds`, or nothing if a single threshold costs less. That can happen because categories are fitted
    separately, and a row with readings in several categories counts in each.
    """
    costs = []
    for thresholds in (own_thresholds, {}):
        of_category = {name: thresholds.get(name, threshold) for name in labels.category_names}
        flagged = _flagged(outcomes, of_category, labels)
        costs.append((flagged & ~outcomes.risky).sum() + cost_ratio * (~flagged & outcomes.risky).sum())
    if costs[0] <= costs[1] * (1 + 1e-12):
        return own_thresholds
    notes.append("One threshold for all categories costs less than one for each: the global one applies to all.")
    return {}


def _allowed(count: int, target: float) -> int:
    """The largest number of `count` rows whose share is at most `target`."""
    allowed = int(count * target + 1e-9)
    return allowed if allowed <= target * count or allowed / count <= target else allowed - 1


def _flagged(outcomes: HeadOutcomes, thresholds: dict[str, float], labels: SafetyLabels) -> np.ndarray:
    """Which rows reach the threshold of a category; categories without one flag nothing."""
    of_category = np.array([thresholds.get(name, np.inf) for name in labels.category_names], np.float32)
    return (outcomes.category_scores >= of_category).any(axis=1)


def _just_above(values: np.ndarray) -> np.ndarray:
    """
    For each of the sorted scores, a threshold that it does not reach but the next score does: half-way between them,
    so that rounding does not matter. A score of 1 reaches every threshold.
    """
    following = np.append(values[1:], np.float32(1))
    middle = ((values.astype(float) + following) / 2).astype(np.float32)
    return np.where(middle > values, middle, following)
