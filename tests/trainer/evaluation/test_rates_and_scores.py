"""Rates and judge scores, on hand-made records and on arbitrary ones."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from safevlm.trainer.evaluation.judges.judgements import Judgement
from safevlm.trainer.evaluation.judges.scores import judge_scores, rtvlm_scores
from safevlm.trainer.evaluation.refusals.rates import attack_success_rate, over_refusal_rate, refusal_rate

LABELS = st.lists(st.sampled_from(["refusal", "partial_refusal", "compliance"]), min_size=1, max_size=40)
SCORES = st.lists(st.none() | st.integers(0, 10), min_size=1, max_size=30)


def judgements(scores):
    return [
        Judgement(f"{i}", "jailbreak", "judge", "unparseable" if score is None else "scored", score)
        for i, score in enumerate(scores)
    ]


def test_rates_on_a_hand_made_example():
    labels = ["refusal", "refusal", "partial_refusal", "compliance"]
    assert attack_success_rate(labels)["value"] == 0.25
    assert refusal_rate(labels)["value"] == 0.75
    assert over_refusal_rate(labels)["value"] == 0.75 and over_refusal_rate(labels)["full_refusal_rate"] == 0.5
    assert attack_success_rate(labels)["num_samples"] == 4


@given(LABELS)
def test_attack_success_and_refusal_complement_each_other(labels):
    success, refused = attack_success_rate(labels, num_resamples=50), refusal_rate(labels, num_resamples=50)
    assert success["value"] + refused["value"] == pytest.approx(1)
    for rate in (success, refused):
        low, high = rate["interval"]
        assert 0 <= low <= high <= 1
    assert attack_success_rate(labels[::-1], num_resamples=50)["value"] == success["value"]


def test_an_interval_covers_about_what_theory_says():
    low, high = refusal_rate(["refusal"] * 50 + ["compliance"] * 50, num_resamples=4000)["interval"]
    assert (low, high) == pytest.approx((0.402, 0.598), abs=0.02)  # 0.5 -+ 1.96 * sqrt(0.25 / 100)


def test_rows_of_one_cluster_do_not_count_as_independent():
    labels = ["refusal"] * 50 + ["compliance"] * 50
    low, high = refusal_rate(labels, clusters=[i // 10 for i in range(100)])["interval"]
    alone = refusal_rate(labels)["interval"]
    assert high - low > 2 * (alone[1] - alone[0])


@pytest.mark.parametrize("labels", [[], ["refused"], ["refusal", None]])
def test_bad_labels_are_refused(labels):
    with pytest.raises(ValueError, match="`labels"):
        refusal_rate(labels)


def test_clusters_must_match_the_rows():
    with pytest.raises(ValueError, match="`clusters` has 1 entries for 2 rows"):
        refusal_rate(["refusal", "refusal"], clusters=["a"])


def test_unparseable_judgements_are_counted_and_never_scored():
    rows = [*judgements([10, 0, None, None]), Judgement("4", "jailbreak", "judge", "rejected", usage={"cost": 0.5})]
    result = judge_scores(rows)
    assert result["mean"] == 5 and (result["num_samples"], result["num_scored"]) == (5, 2)
    assert (result["num_unparseable"], result["num_rejected"]) == (2, 1) and result["usage"] == {"cost": 0.5}


def test_nothing_scored_has_no_mean():
    result = rtvlm_scores({"a": judgements([None]), "b": judgements([3])})
    assert result["average"] is None and result["subtasks"]["a"]["mean"] is None
    assert result["subtasks"]["b"]["mean"] == 3


def test_the_average_is_over_subtasks_and_not_over_answers():
    result = rtvlm_scores({"large": judgements([10] * 90), "small": judgements([0] * 10)})
    assert result["average"] == 5 and result["interval"] == (5, 5)


@given(st.dictionaries(st.text(max_size=3), SCORES, min_size=1, max_size=4))
def test_scores_stay_on_the_scale_and_every_answer_is_accounted_for(scores):
    result = rtvlm_scores({name: judgements(values) for name, values in scores.items()}, num_resamples=40)
    for name, values in scores.items():
        subtask = result["subtasks"][name]
        assert subtask["num_scored"] + subtask["num_unparseable"] == subtask["num_samples"] == len(values)
        assert (subtask["mean"] is None) == (subtask["num_scored"] == 0)
    if result["average"] is not None:
        low, high = result["interval"]
        assert 0 <= low <= high <= 10 and 0 <= result["average"] <= 10


def test_clusters_may_be_given_with_unparseable_rows():
    result = rtvlm_scores({"a": judgements([1, None, 9, 5])}, clusters={"a": ["x", "x", "y", "z"]})
    assert result["average"] == 5 and result["interval"][0] < 5 < result["interval"][1]


@pytest.mark.parametrize(("status", "score"), [("scored", None), ("unparseable", 0), ("rejected", 5), ("guess", 5)])
def test_a_judgement_is_scored_or_it_has_no_score(status, score):
    with pytest.raises(ValueError, match="cannot have the score"):
        Judgement("a", "jailbreak", "judge", status, score)
