"""Has a judge score an evaluation's items from 0 to 10, by the rubric of their task.

Rules alone (`--judge rules`) give no score: their refusal rates are measures of their own.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from safevlm.trainer.data import SafetyRow

from .judge import Judge
from .judgements import JudgeItem
from .local_judge import LocalJudge
from .openai_judge import OpenAiJudge
from .prompt import load_rubrics

GENERAL_RUBRIC = "harmful_request"


def make_judge(spec: str, cache: Path, device: str | None = None) -> Judge | None:
    """
    Args:
        spec (`str`): `"openai:MODEL"` (any compatible endpoint: `OPENAI_BASE_URL`, `OPENAI_API_KEY`), `"hf:ID"`
            (folder or Hub id of a model for this machine), or `"rules"`, for no judge.
        cache (`Path`): File of judgements; items in it are not asked again.
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
    Adds a `judgement` to a task's records and, if it is a score, `judge_score` (0 to 10) to their metrics.

    Tasks with a rubric of their own are judged whole; other tasks only on rows that are not benign.

    Args:
        records (`list[dict]`): As [`make_items`] returns them; `doc_id` is the index of the row.

    Returns:
        The number of judgements by status: `scored`, `unparseable`, `rejected`. Only scored ones enter a mean.
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
    judgements = judge.score(items)
    for record, judgement in zip(chosen, judgements, strict=True):
        record["judgement"] = judgement.to_dict()
        if judgement.score is not None:
            record["metrics"]["judge_score"] = judgement.score
    return dict(Counter(judgement.status for judgement in judgements))
