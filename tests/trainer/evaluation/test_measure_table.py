"""The table of measures names what is computed, no more and no less, and the card knows its sections."""

import pytest
from head_records import LABELS, random_records

from safevlm.model_card.facts import SECTIONS
from safevlm.safety_policy import SafetyPolicy
from safevlm.trainer.evaluation.benchmarks.answer_measures import score_answer
from safevlm.trainer.evaluation.head.measures import category_measures, label_measures, risk_measures
from safevlm.trainer.evaluation.head.outcomes import head_outcomes
from safevlm.trainer.evaluation.measure_table import MEASURES, head_measures, lmms_measures, measures_of


def names(measures):
    return [measure.name for measure in measures]


def test_the_head_computes_the_measures_of_the_table_in_its_order():
    outcomes = head_outcomes(random_records(40), SafetyPolicy(), LABELS)
    assert names(measures_of("labels")) == list(label_measures(outcomes))
    assert names(measures_of("risk")) == list(risk_measures(outcomes))
    assert names(measures_of("category")) == list(category_measures(outcomes, 0))


def test_answers_get_the_measures_of_the_table():
    computed = {
        name for kind in ("harmful", "benign", "other") for name in score_answer(kind, "Is it?", "It is.", "It is.")
    }
    assert computed - {"reaction"} == set(names(measures_of("task")))


def test_every_section_is_one_of_the_cards():
    assert {measure.section for measure in MEASURES.values()} <= set(SECTIONS)


@pytest.mark.parametrize(
    ("task", "expected"),
    [
        ("mmbench_en_dev_static", ["gpt_eval_score"]),
        ("mme", ["mme_perception_score", "mme_cognition_score"]),
        ("mmstar", []),
    ],
)
def test_an_lmms_task_has_the_measures_of_its_family(task, expected):
    assert names(lmms_measures(task)) == expected


def test_the_card_shows_no_measure_twice_and_fewer_than_the_report():
    assert set(names(head_measures("card"))) < set(names(measures_of("labels", "risk")))
