"""Calibration of a policy on labelled rows: temperatures, then thresholds for a wanted false-positive rate or cost.

Temperatures (Guo et al., arXiv 1706.04599) minimise the negative log-likelihood of the labels. Thresholds follow from
the scores under these temperatures (thresholds.py), and what is measured is what `assess` and `generate` enforce: a
row's strictest verdict over its images and the readings of its turns. Half of the rows, by image, are fitted on; what
is reported is of the other half.

A temperature never changes the order of two scores, nor which category or which level above 0 is the most probable.
"""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from safevlm.files import replace_text
from safevlm.safety_labels import SafetyLabels
from safevlm.safety_policy import POLICY_PRESETS, TEMPERATURE_RANGE, SafetyPolicy
from safevlm.safety_verdict import level_log_probabilities, risk_logits

from .measures import HeadOutcomes, head_outcomes, readings, usable
from .predictions import HeadPrediction
from .report import head_report, operating_point
from .thresholds import MIN_ROWS, check_aim, fit_thresholds


@dataclass
class Calibration:
    """
    Args:
        policy (`SafetyPolicy`): The calibrated one.
        compared (`dict[str, SafetyPolicy]`): What it is compared with: the presets, then `"present"`, the policy it
            was made from, and last itself, `"calibrated"`.
        report (`dict`): Ready for JSON: settings, counts, temperatures, thresholds, warnings, and on the report half
            `before` and `after` (see [`head_report`]) and `operating_points` of all policies.
        fit_half, report_half (`list[HeadPrediction]`)
    """

    policy: SafetyPolicy
    compared: dict[str, SafetyPolicy]
    report: dict
    fit_half: list[HeadPrediction]
    report_half: list[HeadPrediction]


def calibrate(
    predictions: Sequence[HeadPrediction],
    policy: SafetyPolicy | dict | str,
    labels: SafetyLabels,
    target_fpr: float | None = None,
    cost_ratio: float | None = None,
    seed: int = 0,
    num_resamples: int = 1000,
) -> Calibration:
    """
    Fits temperatures and thresholds of `policy` on half of the rows and measures them on the other half.

    Args:
        predictions (`Sequence[HeadPrediction]`): Those without both labels or without an image are left out.
        policy (`SafetyPolicy`, `dict`, file or preset name): Keeps all but temperatures and thresholds.
        labels (`SafetyLabels`): The model's.
        target_fpr (`float` in [0, 1)): Largest share of clean rows to flag, or instead
        cost_ratio (`float` > 0): What a missed risky row costs, in flagged clean rows; the sum is minimised.
        seed (`int`): Which images are fitted on.

    Raises:
        `ValueError`: Both or none of the two aims, an aim out of range, a policy that is off, or a half without risky
            or without clean rows.
    """
    policy = SafetyPolicy.from_value(policy).for_labels(labels)
    check_aim(target_fpr, cost_ratio)
    if not policy.enabled:
        raise ValueError(f"Policy {policy.name!r} is off, with nothing to calibrate; use another, such as 'default'.")
    fit_half, report_half = split_by_image(predictions, labels, seed)
    notes: list[str] = []
    calibrated = fit_temperatures(fit_half, policy, labels, notes)
    calibrated, thresholds = fit_thresholds(fit_half, calibrated, labels, target_fpr, cost_ratio, notes)
    calibrated = calibrated.replace(name="calibrated")
    # As a call by their name gets them: with the temperatures of the model's own policy.
    now = {name: getattr(policy, name) for name in ("level_temperature", "category_temperature")}
    compared = {
        name: preset.for_labels(labels).replace(**now) for name, preset in POLICY_PRESETS.items() if preset.enabled
    }
    compared |= {"present": policy, "calibrated": calibrated}
    report = {
        "aim": {"target_fpr": target_fpr} if cost_ratio is None else {"cost_ratio": cost_ratio},
        "seed": seed,
        "fit": _counts(head_outcomes(fit_half, calibrated, labels)),
        "report": _counts(head_outcomes(report_half, calibrated, labels)),
        "num_left_out": len(predictions) - len(fit_half) - len(report_half),
        "temperatures": {
            name: {"before": getattr(policy, name), "after": getattr(calibrated, name)}
            for name in ("level_temperature", "category_temperature")
        },
        "thresholds": thresholds,
        "warnings": notes,
        "operating_points": {
            name: operating_point(report_half, each, labels, num_resamples, seed) for name, each in compared.items()
        },
        "before": head_report(report_half, policy, labels, num_resamples, seed),
        "after": head_report(report_half, calibrated, labels, num_resamples, seed),
    }
    return Calibration(calibrated, compared, report, fit_half, report_half)


def split_by_image(
    predictions: Sequence[HeadPrediction], labels, seed: int = 0
) -> tuple[list[HeadPrediction], list[HeadPrediction]]:
    """Two halves of the rows that can be measured; they share no image and have about the same labels."""
    from sklearn.model_selection import StratifiedGroupKFold

    chosen = usable(predictions)
    outcomes = head_outcomes(chosen, POLICY_PRESETS["default"].for_labels(labels), labels)
    strata = outcomes.category_labels * len(labels.level_names) + outcomes.level_labels
    if outcomes.num_images > 1 and np.bincount(strata).max() > 1:
        folds = StratifiedGroupKFold(n_splits=2, shuffle=True, random_state=seed)
        with warnings.catch_warnings():  # a stratum of one row cannot be in both halves, and need not be
            warnings.filterwarnings("ignore", message="The least populated class", category=UserWarning)
            fit, report = next(folds.split(strata, strata, outcomes.groups))
        halves = [[chosen[i] for i in rows] for rows in (fit, report)]
        if all(outcomes[rows].risky.any() and not outcomes[rows].risky.all() for rows in (fit, report)):
            return halves[0], halves[1]
    raise ValueError(
        f"Calibration needs risky and clean rows of several images, for two halves that share none; got "
        f"{int(outcomes.risky.sum())} risky and {int((~outcomes.risky).sum())} clean rows about {outcomes.num_images} "
        f"image(s). Add rows, or try another seed."
    )


def fit_temperatures(
    predictions: Sequence[HeadPrediction], policy: SafetyPolicy, labels: SafetyLabels, notes: list[str]
) -> SafetyPolicy:
    """`policy` with fitted temperatures; where the rows do not determine one, it stays and `notes` says so."""
    chosen = usable(predictions)
    level_logits, category_logits, rows = readings(chosen, labels, policy.whole_conversation)
    risk = risk_logits(level_logits.double())
    # Each row's riskiest reading; which that is no temperature changes.
    order = np.lexsort((-risk.numpy(), rows.numpy()))
    riskiest = order[np.unique(rows.numpy()[order], return_index=True)[1]]
    level_logits, category_logits = level_logits[riskiest].double(), category_logits[riskiest].double()
    levels, categories = torch.tensor([p.level for p in chosen]), torch.tensor([p.category for p in chosen])
    said_risky = risk_logits(level_logits) > 0
    right_level = torch.where(levels > 0, level_logits[:, 1:].argmax(dim=-1) + 1 == levels, True)
    fitted = {}
    for name, log_probabilities, true_ids, right in (
        (
            "level_temperature",
            lambda temperature: level_log_probabilities(level_logits, temperature),
            levels,
            (said_risky == (levels > 0)) & right_level,
        ),
        (
            "category_temperature",
            lambda temperature: (category_logits / temperature).log_softmax(dim=-1),
            categories,
            category_logits.argmax(dim=-1) == categories,
        ),
    ):
        wrong = int((~right).sum())
        if wrong:
            fitted[name] = fit_temperature(log_probabilities, true_ids)
            if not TEMPERATURE_RANGE[0] * 1.01 < fitted[name] < TEMPERATURE_RANGE[1] * 0.99:
                notes.append(
                    f"`{name}` is at the edge of its range, {TEMPERATURE_RANGE}: on these rows the head's confidence "
                    f"says little about whether it is right."
                )
        if not wrong:  # the likelihood has no maximum, the surer the better
            notes.append(
                f"`{name}` stays {getattr(policy, name):g}: the head is right on all {len(true_ids)} rows of the fit "
                f"half, which says nothing about how often it errs."
            )
        elif wrong < MIN_ROWS:
            notes.append(f"`{name}` rests on the {wrong} of {len(true_ids)} rows that the head is wrong on.")
    return policy.replace(**fitted)


def fit_temperature(log_probabilities: Callable[[float], torch.Tensor], labels: torch.Tensor) -> float:
    """
    The temperature that minimises the negative log-likelihood of `labels`, within `TEMPERATURE_RANGE`.

    Args:
        log_probabilities (`Callable`): From a temperature to log probabilities of shape `(n, num_classes)`.
        labels (`torch.LongTensor` of shape `(n,)`): Not all of them the most probable, or there is no minimum.
    """
    from scipy.optimize import minimize_scalar

    def nll(log_temperature: float) -> float:  # convex in 1 / temperature: one minimum
        return -float(log_probabilities(np.exp(log_temperature)).gather(1, labels.unsqueeze(1)).mean())

    found = minimize_scalar(nll, bounds=np.log(TEMPERATURE_RANGE), method="bounded", options={"xatol": 1e-6})
    return float(np.exp(found.x))


def store_policy(folder: str | os.PathLike, policy: SafetyPolicy, model, processor) -> None:
    """
    Makes `policy` the own policy of the model saved in `folder`: rewrites its `config.json`, whole or not at all.

    Args:
        model, processor: Loaded from `folder`; the processor gives token ids for texts that the model does not know.
    """
    path = Path(folder) / "config.json"
    if not path.is_file():
        raise ValueError(f"{str(folder)!r} is no model folder on this machine; load the model, then save it to one.")
    texts = {text for group in policy.texts(model.config.labels).values() for text in group}
    new_texts = not texts <= model.config.policy_token_ids.keys()
    model.set_safety_policy(policy, processor if new_texts else None)
    config = json.loads(path.read_text(encoding="utf-8"))
    for name in ("safety_policy", "policy_token_ids", "generation_prompt_token_ids", "answer_opening_token_ids"):
        config[name] = getattr(model.config, name)
    replace_text(path, json.dumps(config, indent=2, sort_keys=True) + "\n")


def _counts(outcomes: HeadOutcomes) -> dict[str, int]:
    risky = int(outcomes.risky.sum())
    return {"rows": len(outcomes), "images": outcomes.num_images, "risky": risky, "clean": len(outcomes) - risky}
