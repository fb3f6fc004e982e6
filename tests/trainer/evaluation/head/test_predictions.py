"""Per-row outputs of the head: as at inference, in batches, written, read back and resumed."""

import copy
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from head_records import random_records, record
from hypothesis import given, settings
from hypothesis import strategies as st

from safevlm.safety_policy import SafetyPolicy
from safevlm.safety_verdict import assess_rows
from safevlm.trainer.data import DataError
from safevlm.trainer.evaluation import predict_rows, read_predictions, write_predictions
from safevlm.trainer.evaluation.head.outcomes import readings

FLOATS = st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=4, max_size=4)


@settings(deadline=None, max_examples=50)
@given(logits=FLOATS, name=st.text(), label=st.none() | st.integers(0, 3))
def test_a_record_survives_its_file(logits, name, label, tmp_path_factory):
    path = tmp_path_factory.getbasetemp() / "records.jsonl"
    records = [record(label, label, logits, row_id=name, source=name, images=("a", "b")), record(images=())]
    write_predictions(records, path)
    assert read_predictions(path) == records


@pytest.mark.parametrize(
    "line, reason", [("{", "not valid JSON"), ('{"row_id": "1"}', "not a prediction"), ("3", "not a pred")]
)
def test_a_line_that_is_no_record_is_named(line, reason, tmp_path):
    path = tmp_path / "records.jsonl"
    write_predictions(random_records(2), path)
    path.write_text(path.read_text() + line + "\n")
    with pytest.raises(DataError, match=f"records.jsonl:3 is {reason}"):
        read_predictions(path)


def test_batched_logits_are_those_of_assess_on_the_question_alone(model, processor, rows):
    predictions = predict_rows(model, processor, rows, batch_size=3)
    assert [p.row_id for p in predictions] == [row.row_id for row in rows]
    for row, prediction in zip(rows, predictions, strict=True):
        assert (prediction.level, prediction.category) == (row.level, row.category)
        assert prediction.assessed == bool(row.images)
        text = processor.apply_chat_template(row.messages[:-1], add_generation_prompt=True)
        inputs = processor(images=row.load_images() or None, text=[text], return_tensors="pt")
        verdict = model.assess(**inputs, safety_policy="default")
        if prediction.assessed:
            levels, categories, belongs = readings([prediction], model.config.labels)
            expected = assess_rows(levels, categories, belongs, 1, SafetyPolicy(), model.config.labels)
            torch.testing.assert_close(expected.level_probabilities, verdict.level_probabilities, atol=1e-5, rtol=1e-4)
            torch.testing.assert_close(
                expected.category_probabilities, verdict.category_probabilities, atol=1e-5, rtol=1e-4
            )
        else:
            assert prediction.level_logits == prediction.images == ()


def test_the_answer_is_not_read(model, processor, make_row):
    answered, other = make_row(0, answer="no"), make_row(0, answer="yes yes yes")
    unanswered = replace(answered, messages=answered.messages[:-1])
    logits = [predict_rows(model, processor, [row])[0].level_logits for row in (answered, other, unanswered)]
    assert logits[0] == logits[1] == logits[2]


def test_rows_that_share_an_image_share_its_hash_and_others_do_not(model, processor, make_row, tmp_path):
    image = make_row(0).images[0]
    for name in ("a.png", "copy.png"):
        image.save(tmp_path / name)
    rows = [replace(make_row(i), images=(tmp_path / name,)) for i, name in enumerate(("a.png", "copy.png"))]
    first, copied, other = predict_rows(model, processor, [*rows, make_row(5)])
    assert first.images == copied.images != other.images


@pytest.fixture
def counted(model, monkeypatch):
    """How many rows the head has seen."""
    seen = []
    predict_safety = model.predict_safety

    def predict(input_ids, *args, **kwargs):
        seen.extend(range(len(input_ids)))
        return predict_safety(input_ids, *args, **kwargs)

    monkeypatch.setattr(model, "predict_safety", predict)
    return seen


def test_an_interrupted_run_goes_on_where_it_stopped(model, processor, rows, counted, tmp_path, monkeypatch):
    path = tmp_path / "predictions.jsonl"
    expected = predict_rows(model, processor, rows, batch_size=2)
    with_image = sum(bool(row.images) for row in rows)
    predict = model.predict_safety

    def fail_later(*args, **kwargs):
        if len(counted) >= with_image + 4:
            raise KeyboardInterrupt
        return predict(*args, **kwargs)

    monkeypatch.setattr(model, "predict_safety", fail_later)
    with pytest.raises(KeyboardInterrupt):
        predict_rows(model, processor, rows, batch_size=2, path=path)
    monkeypatch.setattr(model, "predict_safety", predict)
    partial = tmp_path / "predictions.jsonl.partial"
    assert not path.exists() and len(partial.read_text().splitlines()) == 4
    partial.write_text(partial.read_text() + '{"row_id": "to')  # the crash came in the middle of a line
    counted.clear()
    resumed = predict_rows(model, processor, rows, batch_size=2, path=path)
    assert len(counted) == with_image - 4
    assert resumed == read_predictions(path)
    assert [p.row_id for p in resumed] == [p.row_id for p in expected] and not partial.exists()
    for a, b in zip(resumed, expected, strict=True):
        assert np.allclose(a.level_logits, b.level_logits, atol=1e-4)


def test_a_finished_run_is_not_repeated_but_changed_rows_are(model, processor, rows, make_row, counted, tmp_path):
    path = tmp_path / "predictions.jsonl"
    predict_rows(model, processor, rows, path=path)
    counted.clear()
    assert predict_rows(model, processor, rows, path=path) == read_predictions(path)
    assert counted == []
    changed = [replace(rows[0], level=3), make_row(1, question="What?"), *rows[2:]]
    again = predict_rows(model, processor, changed, path=path)
    assert len(counted) == 2 and again[0].level == 3 and len(read_predictions(path)) == len(rows)


def test_predictions_of_other_weights_are_not_used(model, processor, rows, tmp_path):
    path = tmp_path / "predictions.jsonl"
    before = predict_rows(model, processor, rows, path=path)
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.safety.head.level_classifier.bias.add_(1.0)
        other.safety.head.level_classifier.bias[0] += 1.0
    after = predict_rows(other, processor, rows, path=path)
    assert all(a.level_logits != b.level_logits for a, b in zip(before, after, strict=True) if a.assessed)


def test_equal_rows_are_predicted_once_and_all_returned(model, processor, make_row, counted):
    predictions = predict_rows(model, processor, [make_row(0), make_row(0), make_row(0)])
    assert len(predictions) == 3 and len(counted) == 1


def test_logits_that_are_not_finite_name_the_row(model, processor, make_row):
    broken = copy.deepcopy(model)
    with torch.no_grad():
        broken.safety.head.level_classifier.bias.fill_(float("nan"))
    with pytest.raises(ValueError, match="row 'row-0': the safety head's logits are not finite in torch.float32"):
        predict_rows(broken, processor, [make_row(0)])


def test_training_mode_is_restored_and_does_not_matter(model, processor, make_row):
    trained = copy.deepcopy(model).train()
    assert predict_rows(trained, processor, [make_row(0)]) == predict_rows(model, processor, [make_row(0)])
    assert trained.training


def test_a_batch_size_of_nothing_is_refused(model, processor):
    with pytest.raises(ValueError, match="`batch_size` must be 1 or more, got 0"):
        predict_rows(model, processor, [], batch_size=0)


def test_records_are_one_json_object_per_line(tmp_path):
    path = tmp_path / "records.jsonl"
    write_predictions(random_records(3), path)
    assert [json.loads(line)["row_id"] for line in path.read_text().splitlines()] == ["row-0", "row-1", "row-2"]
