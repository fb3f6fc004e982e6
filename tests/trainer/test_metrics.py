"""Metrics of the safety head on hand-made verdicts."""

from types import SimpleNamespace

import numpy as np
import pytest

from safevlm.trainer.evaluation import head_metrics, trainer_metrics


def test_metrics_of_a_worked_example():
    # Categories: class 0 has precision 1/2, recall 1; class 1 precision 1, recall 1/2; class 2 is right.
    # F1: 2/3, 2/3, 1. Scores order one of the 2 x 2 (risky, safe) pairs wrongly.
    metrics = head_metrics(
        level_labels=[1, 3, 0, 0],
        level_predictions=[1, 2, 0, 0],
        category_labels=[0, 1, 1, 2],
        category_predictions=[0, 0, 1, 2],
        scores=[0.9, 0.3, 0.4, 0.1],
    )
    assert metrics == {
        "category_macro_f1": pytest.approx((2 / 3 + 2 / 3 + 1) / 3),
        "level_accuracy": 0.75,
        "auroc": 0.75,
        "num_assessed": 4,
    }


def test_macro_f1_is_over_the_categories_that_occur():
    metrics = head_metrics([1, 1], [1, 1], [0, 0], [0, 5], [0.5, 0.5])
    assert metrics["category_macro_f1"] == pytest.approx(2 / 3)  # precision 1, recall 1/2 of category 0; 5 is no label


@pytest.mark.parametrize("levels", [[0, 0], [1, 2]])
def test_auroc_needs_both_risky_and_safe_rows(levels):
    assert head_metrics(levels, levels, [0, 0], [0, 0], [0.1, 0.2])["auroc"] is None


def test_tied_scores_count_half():
    assert head_metrics([1, 0], [1, 0], [0, 0], [0, 0], [0.5, 0.5])["auroc"] == 0.5


def test_no_row_at_all_is_an_error():
    with pytest.raises(ValueError, match="No labelled row with an image"):
        head_metrics([], [], [], [], [])


def prediction(level_logits, category_logits, level_labels, category_labels, assessed=None):
    labels = (np.zeros((len(level_labels), 3)), np.array(level_labels), np.array(category_labels))
    assessed = np.array([True] * len(level_labels) if assessed is None else assessed)
    return SimpleNamespace(predictions=(np.array(level_logits), np.array(category_logits), assessed), label_ids=labels)


def test_trainer_metrics_take_the_arg_max_and_the_probability_of_any_risk():
    metrics = trainer_metrics(
        prediction([[3.0, 0, 0], [0, 0, 3.0], [2.0, 0, 0]], [[0.0, 1], [1, 0], [0, 1]], [0, 2, 1], [1, 0, 1])
    )
    assert metrics == {
        "category_macro_f1": 1.0,
        "level_accuracy": pytest.approx(2 / 3),
        "auroc": 1.0,
        "num_assessed": 3,
    }


def test_rows_without_label_or_image_are_left_out():
    metrics = trainer_metrics(
        prediction(
            [[3.0, 0, 0], [0, 0, 3.0], [0, 3.0, 0], [0, 0, 0]],
            [[0.0, 1], [1, 0], [1, 0], [0, 0]],
            [0, 2, -100, 0],
            [1, 0, 0, 1],
            assessed=[True, True, True, False],
        )
    )
    assert metrics["num_assessed"] == 2 and metrics["level_accuracy"] == 1.0


def test_nothing_to_assess_is_said_not_raised():
    assert trainer_metrics(prediction([[1.0, 0]], [[1.0, 0]], [-100], [-100])) == {"num_assessed": 0}
