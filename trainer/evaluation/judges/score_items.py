"""Which judge scores which items of an evaluation: scores from 0 to 10, by the rubric of the task.

Rules alone (`--judge rules`) give no score: their refusal rates are metrics of their own.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from safevlm.trainer.data import SafetyRow

from .judge import Judge, LocalJudge, OpenAiJudge
from .judgements import JudgeItem
from .prompt import load_rubrics

GENERAL_RUBRIC = "harmful_request"


def make_judge(spec: str, cache: Path, device: str | None = None) -> Judge | None:
    """
    Args:
        spec (`str`): `"openai:MODEL"` (any compatible endpoint: `OPENAI_BASE_URL`, `OPENAI_API_KEY`), `"hf:ID"`
            (folder or Hub id of a model for this machine), or `"rules"`, which is no judge.
        cache (`Path`): File of verdicts; what is in it is not asked again.
    """
    kind, _, model = spec.partition(":")
    if spec == "rules":
        return None
    if kind == "openai" and model:
        return OpenAiJudge(model, base_url=os.environ.get("OPENAI_BASE_URL"), cache=cache)
    if kind == "hf" and model:
        return LocalJudge(model, cache=cache, device=device)
    raise ValueError(f"--judge must be rules, openai:MODEL or hf:ID, got {spec!r}.")


def judge_records(judge: Judge, task: str, records: list[dict], rows: Sequence[SafetyRow]) -> dict[str, int]:
    """
    Adds `judgement`, and `judge_score` (0 to 10) among the metrics where there is a score, to a task's records.

    Tasks with a rubric of their own are scored whole, others on their rows that are not benign.

    Args:
        records: As the engine makes them; `doc_id` is the row's number.

    Returns:
        How many verdicts there are by status: `scored`, `unparseable`, `rejected`. Only scored ones enter a mean.
    """
    rubric = next((name for name, rubric in load_rubrics().items() if task in rubric.tasks), None)
    chosen = [record for record in records if rubric is not None or record["kind"] != "benign"]
    items = [
        JudgeItem(
            item_id=f"{task}/{record['row_id']}",
            rubric=rubric or GENERAL_RUBRIC,
            question=record["prompt"],
            answer=record["answer"],
            image=next(iter(rows[record["doc_id"]].images), None),
            reference=record["reference"],
        )
        for record in chosen
    ]
    verdicts = judge.score(items)
    for record, verdict in zip(chosen, verdicts, strict=True):
        record["judgement"] = verdict.to_dict()
        if verdict.score is not None:
            record["metrics"]["judge_score"] = verdict.score
    return dict(Counter(verdict.status for verdict in verdicts))
