"""Calibration of a policy on labelled rows: temperatures, then thresholds for a wanted false-positive rate or cost.

Both are fitted on half of the rows, split by image, and reported on the other half. Scores and thresholds are those
that `assess` and `generate` enforce: a row's strictest verdict over its images and the readings of its turns.
"""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from safevlm.files import replace_json
from safevlm.safety_labels import SafetyLabels
from safevlm.safety_policy import POLICY_PRESETS, SafetyPolicy

from .outcomes import HeadOutcomes, head_outcomes, usable
from .predictions import HeadPrediction
from .report import head_report, operating_point
from .temperatures import fit_temperatures
from .thresholds import check_aim, fit_thresholds

_TEMPERATURES = ("level_temperature", "category_temperature")


@dataclass
class Calibration:
    """
    Args:
        policy (`SafetyPolicy`): The calibrated policy.
        compared (`dict[str, SafetyPolicy]`): The policies it is compared with: the presets, then `"present"`, the
            policy it was made from, and finally `"calibrated"`, the policy itself.
        report (`dict`): Ready for JSON: settings, counts, temperatures, thresholds and warnings; and, on the report
            half, `before` and `after` (see [`head_report`]) and the `operating_points` of all policies.
        fit_half, report_half (`list[HeadPrediction]`): The two halves of the rows.
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
        predictions (`Sequence[HeadPrediction]`): Rows without both labels or without an image are left out.
        policy (`SafetyPolicy`, `dict`, file or preset name): Keeps everything but its temperatures and thresholds.
        labels (`SafetyLabels`): The model's.
        target_fpr (`float` in [0, 1), *optional*): The largest share of clean rows to flag. Give this or `cost_ratio`.
        cost_ratio (`float` > 0, *optional*): The cost of a missed risky row, in flagged clean rows; the total cost is
            minimised.
        seed (`int`): Decides which images are fitted on.
        num_resamples (`int`): Number of bootstrap resamples of the report.

    Raises:
        `ValueError`: Both or neither of the two aims, an aim out of range, a policy that is off, or a half without
            risky or without clean rows.
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
    compared = {**_presets_like(policy, labels), "present": policy, "calibrated": calibrated}
    report = {
        "aim": {"target_fpr": target_fpr} if cost_ratio is None else {"cost_ratio": cost_ratio},
        "seed": seed,
        "fit": _counts(head_outcomes(fit_half, calibrated, labels)),
        "report": _counts(head_outcomes(report_half, calibrated, labels)),
        "num_left_out": len(predictions) - len(fit_half) - len(report_half),
        "temperatures": {
            name: {"before": getattr(policy, name), "after": getattr(calibrated, name)} for name in _TEMPERATURES
        },
        "thresholds": thresholds,
        "warnings": notes,
        "operating_points": {
            name: operating_point(report_half, compared_policy, labels, num_resamples, seed)
            for name, compared_policy in compared.items()
        },
        "before": head_report(report_half, policy, labels, num_resamples, seed),
        "after": head_report(report_half, calibrated, labels, num_resamples, seed),
    }
    return Calibration(calibrated, compared, report, fit_half, report_half)


def split_by_image(
    predictions: Sequence[HeadPrediction], labels: SafetyLabels, seed: int = 0
) -> tuple[list[HeadPrediction], list[HeadPrediction]]:
    """Two halves of the rows that can be measured. They share no image and have about the same labels."""
    from sklearn.model_selection import StratifiedGroupKFold

    measurable = usable(predictions)
    outcomes = head_outcomes(measurable, POLICY_PRESETS["default"].for_labels(labels), labels)
    strata = outcomes.category_labels * len(labels.level_names) + outcomes.level_labels
    if outcomes.num_images > 1 and np.bincount(strata).max() > 1:
        folds = StratifiedGroupKFold(n_splits=2, shuffle=True, random_state=seed)
        with warnings.catch_warnings():  # a stratum of one row cannot be in both halves and need not be
            warnings.filterwarnings("ignore", message="The least populated class", category=UserWarning)
            fit_rows, report_rows = next(folds.split(strata, strata, outcomes.groups))
        if outcomes[fit_rows].has_risky_and_clean and outcomes[report_rows].has_risky_and_clean:
            return [measurable[row] for row in fit_rows], [measurable[row] for row in report_rows]
    raise ValueError(
        f"Calibration needs risky and clean rows of several images, for two halves that share none; got "
        f"{int(outcomes.risky.sum())} risky and {int((~outcomes.risky).sum())} clean rows about {outcomes.num_images} "
        f"image(s). Add rows, or try another seed."
    )


def store_policy(folder: str | os.PathLike, policy: SafetyPolicy, model, processor) -> None:
    """
    Makes `policy` the own policy of the model saved in `folder`: rewrites its `config.json`, whole or not at all.

    Args:
        model (`SafeVlmForConditionalGeneration`), processor (`SafeVlmProcessor`): Loaded from `folder`. The processor
            gives token ids for texts that the model does not know.
    """
    path = Path(folder) / "config.json"
    if not path.is_file():
        raise ValueError(
            f"{str(folder)!r} is not a model folder on this machine; load the model, then save it to one."
        )
    texts = {text for group in policy.texts(model.config.labels).values() for text in group}
    new_texts = not texts <= model.config.policy_token_ids.keys()
    model.set_safety_policy(policy, processor if new_texts else None)
    config = json.loads(path.read_text(encoding="utf-8"))
    for name in ("safety_policy", "policy_token_ids", "generation_prompt_token_ids", "answer_opening_token_ids"):
        config[name] = getattr(model.config, name)
    replace_json(path, config, sort_keys=True, ensure_ascii=True)


def _presets_like(policy: SafetyPolicy, labels: SafetyLabels) -> dict[str, SafetyPolicy]:
    """The presets as a call by their names gets them: with the temperatures of the model's own policy."""
    temperatures = {name: getattr(policy, name) for name in _TEMPERATURES}
    return {
        name: preset.for_labels(labels).replace(**temperatures)
        for name, preset in POLICY_PRESETS.items()
        if preset.enabled
    }


def _counts(outcomes: HeadOutcomes) -> dict[str, int]:
    risky = int(outcomes.risky.sum())
    return {"rows": len(outcomes), "images": outcomes.num_images, "risky": risky, "clean": len(outcomes) - risky}
