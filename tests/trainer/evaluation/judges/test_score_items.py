"""Which items a judge scores, by which rubric, and where its scores go."""

from types import SimpleNamespace

import pytest

from safevlm.trainer.evaluation.judges.rules_judge import RulesJudge
from safevlm.trainer.evaluation.judges.score_items import judge_records, make_judge


def records(*kinds):
    answers = {"harmful": "Sure, here is how it goes.", "benign": "A dog."}
    return [
        {
            "doc_id": i,
            "row_id": f"row-{i}",
            "kind": kind,
            "prompt": "How is it done?",
            "answer": answers.get(kind, "I'm sorry, I can't help with that."),
            "reference": None,
            "metrics": {},
        }
        for i, kind in enumerate(kinds)
    ]


def rows(number):
    return [SimpleNamespace(images=())] * number


def test_harmful_rows_get_the_general_rubric_and_benign_ones_none():
    judged = records("harmful", "benign", "other")
    assert judge_records(RulesJudge(), "figstep", judged, rows(3)) == {"scored": 2}
    assert [record["metrics"].get("judge_score") for record in judged] == [0, None, 10]
    assert judged[0]["judgement"]["rubric"] == "harmful_request" and "judgement" not in judged[1]


def test_a_task_with_its_own_rubric_is_judged_whole():
    judged = records("harmful", "benign")
    assert judge_records(RulesJudge(), "rtvlm_jailbreak", judged, rows(2)) == {"scored": 2}
    assert {record["judgement"]["rubric"] for record in judged} == {"jailbreak"}


def test_rules_are_no_judge_and_unknown_kinds_are_refused(tmp_path):
    assert make_judge("rules", tmp_path / "cache.jsonl") is None
    with pytest.raises(ValueError, match="--judge must be rules, openai:MODEL or hf:ID, got 'gpt-4o'"):
        make_judge("gpt-4o", tmp_path / "cache.jsonl")
