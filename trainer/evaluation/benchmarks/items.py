"""The items of an evaluation as records: what was asked, answered and judged, and how it was measured."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safevlm.files import replace_text
from safevlm.trainer.evaluation.reasoning import split_reasoning

from .scoring import rates_by

_SAMPLE_FIELDS = {
    *("doc_id", "doc", "target", "arguments", "resps", "filtered_resps", "token_counts", "doc_hash", "input_media"),
}


def make_items(samples: dict[str, list[dict]], answers: dict) -> dict[str, list[dict]]:
    """One record per item of each task, in the task's order, from lmms-eval's samples and the answer log."""
    by_task = {}
    for task, logged in samples.items():
        by_task[task] = []
        for sample in sorted(logged, key=lambda sample: sample["doc_id"]):
            answer = answers[task, sample["doc_id"]]
            doc = sample["doc"]
            facts = {name: doc[name] for name in ("row_id", "kind", "category", "level", "source") if name in doc}
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
    """How many items are behind each metric, and the rates by category and source."""
    facts: dict[str, Any] = {
        "num_items": {
            task: {name: sum(name in record["metrics"] for record in records) for name in metrics[task]}
            for task, records in by_task.items()
        },
        "by_category": {task: rates_by(records, "category") for task, records in by_task.items()},
        "by_source": {task: rates_by(records, "source") for task, records in by_task.items()},
    }
    everything = [record for records in by_task.values() for record in records]
    facts["num_guard_replies_without_verdict"] = sum(
        (record["verdict"] or {}).get("flagged", False) is None for record in everything
    )
    facts["num_failed_verdicts"] = sum("error" in (record["verdict"] or {}) for record in everything)
    facts["num_unfinished_reasoning"] = sum(not split_reasoning(record["answer"])[1] for record in everything)
    return facts


def write_items(path: Path, records: list[dict]):
    replace_text(path, "".join(json.dumps(r, ensure_ascii=False, default=str) + "\n" for r in records))
