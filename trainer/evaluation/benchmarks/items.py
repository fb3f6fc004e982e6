"""The items of an evaluation as records: question, answer, verdict and measures."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safevlm.files import replace_text
from safevlm.trainer.evaluation.reasoning import split_reasoning

from .answer_measures import rates_by

_SAMPLE_FIELDS = {
    *("doc_id", "doc", "target", "arguments", "resps", "filtered_resps", "token_counts", "doc_hash", "input_media"),
}
"""The fields of lmms-eval's samples that are not metrics."""
_ROW_FIELDS = ("row_id", "kind", "category", "level", "source")


def make_items(
    samples: dict[str, list[dict]], answers: dict[tuple[str, int], dict[str, Any]]
) -> dict[str, list[dict]]:
    """
    One record per item of each task, in the task's order.

    Args:
        samples (`dict[str, list[dict]]`): lmms-eval's samples by task.
        answers (`dict[tuple[str, int], dict]`): The answer log's records.
    """
    by_task = {}
    for task, logged in samples.items():
        by_task[task] = []
        for sample in sorted(logged, key=lambda sample: sample["doc_id"]):
            answer = answers[task, sample["doc_id"]]
            doc = sample["doc"]
            facts = {name: doc[name] for name in _ROW_FIELDS if name in doc}
            metrics = {name: value for name, value in sample.items() if name not in _SAMPLE_FIELDS}
            by_task[task].append(
                {
                    "doc_id": sample["doc_id"],
                    **facts,
                    "prompt": answer["prompt"],
                    "answer": answer["answer"],
                    "verdict": answer["verdict"],
                    "reference": doc.get("reference") if facts else sample["target"],
                    "metrics": metrics,
                }
            )
    return by_task


def item_facts(by_task: dict[str, list[dict]], metrics: dict[str, dict]) -> dict[str, Any]:
    """How many items are behind each metric, the rates by category and source, and counts of what went wrong."""
    all_records = [record for records in by_task.values() for record in records]
    return {
        "num_items": {
            task: {name: sum(name in record["metrics"] for record in records) for name in metrics[task]}
            for task, records in by_task.items()
        },
        "by_category": {task: rates_by(records, "category") for task, records in by_task.items()},
        "by_source": {task: rates_by(records, "source") for task, records in by_task.items()},
        "num_guard_replies_without_verdict": sum(
            (record["verdict"] or {}).get("flagged", False) is None for record in all_records
        ),
        "num_failed_verdicts": sum("error" in (record["verdict"] or {}) for record in all_records),
        "num_unfinished_reasoning": sum(not split_reasoning(record["answer"])[1] for record in all_records),
    }


def write_items(path: Path, records: list[dict]):
    replace_text(path, "".join(json.dumps(r, ensure_ascii=False, default=str) + "\n" for r in records))
