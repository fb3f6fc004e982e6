"""How good a SafeVLM's verdicts on the labelled rows of our tasks are: the safety head's report and plots."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from transformers import AutoConfig

from safevlm import SafeVlmConfig
from safevlm.safety_policy import SafetyLabels, SafetyPolicy
from safevlm.trainer.data import SafetyRow
from safevlm.trainer.data.images import image_key
from safevlm.trainer.evaluation.head.plots import plot_head_report
from safevlm.trainer.evaluation.head.predictions import HeadPrediction
from safevlm.trainer.evaluation.head.report import head_report

from .systems import System
from .task_data import LocalTaskManager


def measure_verdicts(
    system: System, items: dict[str, list[dict]], manager: LocalTaskManager, folder: Path, seed: int
) -> dict | None:
    """
    The report on a system's verdicts, with plots in `folder`; `None` if no labelled row has a verdict of a SafeVLM.

    Args:
        items (`dict[str, list[dict]]`): The system's items by task, as [`make_items`] returns them.
    """
    config = AutoConfig.from_pretrained(system.checkpoint)
    if config.model_type != SafeVlmConfig.model_type:
        return None
    labels, predictions = config.labels, []
    for task, records in items.items():
        rows = manager.rows(task)
        if rows is not None:
            predictions += head_predictions(records, rows, labels)
    if not any(prediction.level is not None and prediction.category is not None for prediction in predictions):
        return None
    policy = SafetyPolicy.from_value(config.safety_policy if system.policy is None else system.policy)
    # The verdicts' probabilities are calibrated already.
    policy = policy.for_labels(labels).replace(level_temperature=1.0, category_temperature=1.0)
    plot_head_report(predictions, policy, labels, folder)
    return head_report(predictions, policy, labels, seed=seed)


def head_predictions(records: list[dict], rows: Sequence[SafetyRow], labels: SafetyLabels) -> list[HeadPrediction]:
    """
    The verdicts on items in the form that [`head_report`] takes: probabilities, already calibrated, as log
    probabilities. Items without a verdict of the head (no image, or numbers that are not finite) are left out.

    Args:
        records (`list[dict]`): Items of one task.
        rows (`Sequence[SafetyRow]`): The task's rows; an item's `doc_id` is the index of its row.
        labels (`SafetyLabels`): The model's. An item with a label that it lacks counts as unlabelled.
    """
    return [
        HeadPrediction(
            row_id=record["row_id"],
            source=record["source"],
            level=_label_id(record["level"], labels.level_names),
            category=_label_id(record["category"], labels.category_names),
            level_logits=(_logs(record["verdict"]["level_probabilities"]),),
            category_logits=(_logs(record["verdict"]["category_probabilities"]),),
            whole_conversation=(False,),
            images=tuple(str(image_key(image)) for image in rows[record["doc_id"]].images),
            fingerprint="",
        )
        for record in records
        if (record["verdict"] or {}).get("level_probabilities") and "row_id" in record
    ]


def _label_id(label: str | None, names: Sequence[str]) -> int | None:
    return list(names).index(label) if label in names else None


def _logs(probabilities: dict[str, float]) -> tuple[float, ...]:
    return tuple(math.log(max(probability, 1e-45)) for probability in probabilities.values())
