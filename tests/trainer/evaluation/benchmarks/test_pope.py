"""POPE's published scoring, on hand-made answers and the real label files."""

import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from safevlm.trainer.evaluation.benchmarks.pope import pope_answer, pope_metrics, read_pope_labels

FOLDER = Path(__file__).parents[4] / os.environ.get("SAFEVLM_TEST_DATA", "../shared/data") / "pope_coco/output/coco"


@pytest.fixture(params=["random", "popular", "adversarial"])
def labels(request):
    path = FOLDER / f"coco_pope_{request.param}.json"
    if not path.exists():
        pytest.skip(f"no POPE labels at {path}; set SAFEVLM_TEST_DATA")
    return [question.label for question in read_pope_labels(path)]


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("Yes.", "yes"),
        ("yes", "yes"),
        ("No", "no"),
        ("no.", "no"),
        ("No, there is no dog.", "no"),
        ("There is not a dog in the image.", "no"),
        ("I see none. No dog.", "yes"),  # only the first sentence counts
        ("Yes. It is not small.", "yes"),
        ("Nothing of the kind", "yes"),  # whole words only
        ("There isn't", "yes"),
        ("NO", "yes"),
        ("", "yes"),
    ],
)
def test_answers_are_read_by_the_published_rule(answer, expected):
    assert pope_answer(answer) == expected


def test_gold_answers_score_fully(labels):
    metrics = pope_metrics(labels, [label.capitalize() + "." for label in labels])
    assert [metrics[name] for name in ("accuracy", "precision", "recall", "f1", "yes_ratio")] == [1, 1, 1, 1, 0.5]
    assert metrics["num_samples"] == 3000 and metrics["num_unclear"] == 0


def test_all_yes(labels):
    metrics = pope_metrics(labels, ["Yes"] * 3000)
    assert [metrics[name] for name in ("accuracy", "precision", "recall", "yes_ratio")] == [0.5, 0.5, 1, 1]
    assert metrics["f1"] == pytest.approx(2 / 3)
    counts = ("true_positives", "false_positives", "true_negatives", "false_negatives")
    assert [metrics[f"num_{name}"] for name in counts] == [1500, 1500, 0, 0]


def test_all_no(labels):
    metrics = pope_metrics(labels, ["No, there is none."] * 3000)
    assert [metrics[name] for name in ("accuracy", "precision", "recall", "f1", "yes_ratio")] == [0.5, 0, 0, 0, 0]


def test_a_hand_made_file():
    answers = ["Yes", "No", "no", "I do not see one.", "Yes, it is", "A dog."]
    metrics = pope_metrics(["yes", "yes", "no", "no", "no", "yes"], answers)
    counts = ("true_positives", "false_positives", "true_negatives", "false_negatives", "unclear")
    assert [metrics[f"num_{name}"] for name in counts] == [2, 1, 2, 1, 1]
    assert metrics["accuracy"] == metrics["precision"] == metrics["recall"] == metrics["f1"] == pytest.approx(2 / 3)


@given(st.lists(st.tuples(st.sampled_from(["yes", "no"]), st.text()), min_size=1))
def test_accuracy_follows_from_the_counts(pairs):
    labels, answers = zip(*pairs, strict=True)
    metrics = pope_metrics(labels, answers)
    tp, fp = metrics["num_true_positives"], metrics["num_false_positives"]
    tn, fn = metrics["num_true_negatives"], metrics["num_false_negatives"]
    assert tp + fp + tn + fn == len(pairs) and metrics["accuracy"] == (tp + tn) / len(pairs)
    assert metrics["precision"] == pytest.approx(tp / (tp + fp) if tp + fp else 0)
    assert metrics["recall"] == pytest.approx(tp / (tp + fn) if tp + fn else 0)
    assert metrics["yes_ratio"] == (tp + fp) / len(pairs)


def test_a_missing_answer_is_an_error():
    with pytest.raises(ValueError, match="one entry per label: got 1 for 2"):
        pope_metrics(["yes", "no"], ["yes"])


@pytest.mark.parametrize("line", ["{}", '{"question_id": 1, "image": "a", "text": "b", "label": "maybe"}', "[1]", "x"])
def test_a_broken_label_line_is_named(tmp_path, line):
    path = tmp_path / "labels.json"
    path.write_text('{"question_id": 1, "image": "a", "text": "b", "label": "no"}\n' + line)
    with pytest.raises(ValueError, match="labels.json, line 2"):
        read_pope_labels(path)
