"""Measures of the safety head: worked examples, what is not defined, and resamples against scikit-learn."""

import numpy as np
import pytest
from head_records import LABELS, record, scored
from hypothesis import given, settings
from hypothesis import strategies as st

from safevlm.safety_policy import SafetyPolicy
from safevlm.trainer.evaluation.head.measures import (
    category_measures,
    expected_calibration_error,
    label_measures,
    reliability_curve,
    resampled_category_measures,
    resampled_label_measures,
    resampled_risk_measures,
    risk_measures,
)
from safevlm.trainer.evaluation.head.outcomes import HeadOutcomes, head_outcomes


def outcomes(scores, level_labels, levels=None, category_labels=None, categories=None, groups=None):
    n = len(scores)
    level_labels = np.array(level_labels)
    scores = np.array(scores, dtype=np.float32)
    return HeadOutcomes(
        level_labels=level_labels,
        category_labels=np.array(category_labels if category_labels is not None else np.where(level_labels, 0, 6)),
        levels=np.array(levels if levels is not None else level_labels),
        categories=np.array(categories if categories is not None else np.where(level_labels, 0, 6)),
        scores=scores,
        category_scores=scores[:, None],
        category_confidence=scores,
        category_correct=level_labels > 0,
        groups=np.arange(n) if groups is None else np.array(groups),
        sources=np.full(n, "s"),
    )


def test_risk_measures_of_a_worked_example():
    # Of the 3 x 3 pairs one is in the wrong order. All risky rows are caught from 0.3 on, and then one clean row.
    # Precision at each risky row, from the top: 1/1, 2/2, 3/4.
    measures = risk_measures(outcomes([0.9, 0.8, 0.3, 0.7, 0.2, 0.1], [1, 2, 3, 0, 0, 0], levels=[1, 1, 0, 1, 0, 0]))
    assert measures["auroc"] == pytest.approx(8 / 9)
    assert measures["auprc"] == pytest.approx((1 + 1 + 3 / 4) / 3)
    assert measures["fpr_at_95_tpr"] == pytest.approx(1 / 3)
    assert measures["recall"] == pytest.approx(2 / 3)
    assert measures["false_positive_rate"] == pytest.approx(1 / 3)


def test_kappa_weights_errors_by_their_square():
    # Observed: one error of distance 1. By chance: 32 / 4 = 8.
    measures = label_measures(outcomes([0.1] * 4, [0, 1, 2, 3], levels=[0, 1, 2, 2]))
    assert measures["level_kappa"] == pytest.approx(1 - 1 / 8)
    assert measures["level_accuracy"] == 0.75


def test_kappa_counts_levels_that_do_not_occur():
    # Observed: one row of level 3 called 1. Were levels numbered by occurrence, 1 and 3 would be neighbours.
    measures = label_measures(outcomes([0.1] * 3, [0, 3, 3], levels=[0, 3, 1]))
    by_chance = (1 * (0 + 9 + 1) + 2 * (9 + 0 + 4)) / 3  # labels 0, 3, 3 against verdicts 0, 3, 1
    assert measures["level_kappa"] == pytest.approx(1 - 4 / by_chance)


def test_calibration_error_of_a_worked_example():
    # Two bins of two rows: gaps 0.5 - 0.15 and 1 - 0.95.
    assert expected_calibration_error([0, 1, 1, 1], [0.15, 0.15, 0.95, 0.95]) == pytest.approx((0.35 + 0.05) / 2)


def test_reliability_bins_hold_all_rows():
    bins = reliability_curve([0, 1, 1, 1], [0.0, 0.1, 0.1000001, 1.0])
    assert [(b["low"], b["count"]) for b in bins] == [(0.0, 2), (0.1, 1), (0.9, 1)]
    assert [b["observed_rate"] for b in bins] == [0.5, 1.0, 1.0]


@pytest.mark.parametrize("level", [0, 2])
def test_what_one_class_does_not_define_is_none_not_zero(level):
    measures = risk_measures(outcomes([0.2, 0.6], [level, level]))
    assert measures["auroc"] is measures["auprc"] is measures["fpr_at_95_tpr"] is None
    assert (measures["recall"] is None) == (level == 0) and (measures["false_positive_rate"] is None) == (level > 0)
    assert label_measures(outcomes([0.2], [level]))["level_kappa"] is None


def test_a_category_that_is_never_said_has_no_precision():
    measures = category_measures(outcomes([0.5], [1], category_labels=[2], categories=[0]), 2)
    assert measures == {"precision": None, "recall_of_category": 0.0, "f1": 0.0}
    assert set(category_measures(outcomes([0.5], [1]), 3).values()) == {None}


def test_outcomes_are_the_verdicts_of_the_policy():
    records = [scored(0.6, 2, 4, verdict=4), scored(0.6, 0, verdict=1), scored(0.2, 0, verdict=4)]
    policy = SafetyPolicy(risk_threshold=0.5, category_risk_thresholds={"illegal risk": 0.7})
    verdicts = head_outcomes(records, policy, LABELS)
    np.testing.assert_allclose(verdicts.scores, [0.6, 0.6, 0.2], rtol=1e-6)
    assert verdicts.flagged.tolist() == [True, False, False]
    assert verdicts.categories.tolist() == [4, 6, 6]
    assert verdicts.category_scores.argmax(axis=1).tolist() == [4, 1, 4]
    np.testing.assert_allclose(verdicts.highest_scores, verdicts.scores)


def test_rows_without_label_or_image_are_not_measured():
    records = [record(images=()), record(level=None), record(category=None), record()]
    assert len(head_outcomes(records, SafetyPolicy(), LABELS)) == 1
    with pytest.raises(ValueError, match="None of 3 rows has both labels and an image"):
        head_outcomes(records[:3], SafetyPolicy(), LABELS)


def test_predictions_of_another_model_are_refused():
    with pytest.raises(ValueError, match="row 'row' has 2 level and 7 category logits"):
        head_outcomes([record(level_logits=(0.0, 0.0))], SafetyPolicy(), LABELS)


ROWS = st.lists(
    st.tuples(
        st.sampled_from([0.0, 0.05, 0.1, 0.3, 0.5, 0.75, 1.0]) | st.floats(0, 1, width=32),
        st.integers(0, 3),
        st.integers(0, 3),
        st.integers(0, 6),
        st.integers(0, 6),
        st.integers(0, 3),
    ),
    min_size=1,
    max_size=25,
)


@settings(deadline=None, max_examples=150)
@given(ROWS, st.integers(0, 6))
def test_resampled_measures_equal_scikit_learns_on_the_repeated_rows(rows, category):
    scores, level_labels, levels, category_labels, categories, times = map(np.array, zip(*rows, strict=True))
    if not times.any():
        times = np.ones_like(times)
    given_rows = outcomes(scores, level_labels, levels, category_labels, categories)
    repeated = given_rows[np.repeat(np.arange(len(rows)), times)]
    weights = times[None].astype(float)
    expected = label_measures(repeated) | risk_measures(repeated) | category_measures(repeated, category)
    measures = (
        resampled_label_measures(given_rows, weights)
        | resampled_risk_measures(given_rows, weights)
        | resampled_category_measures(given_rows, category, weights)
    )
    assert measures.keys() == expected.keys()
    for name, value in expected.items():
        assert measures[name].shape == (1,)
        assert measures[name][0] == pytest.approx(np.nan if value is None else value, nan_ok=True, abs=1e-6), name
