"""What calibration measures is what the model enforces: on rows with several images and turns, for any policy."""

import copy
import random

import pytest
import torch
from head_records import scored
from tiny import chat, picture

from safevlm.safety_policy import SafetyPolicy
from safevlm.trainer.data import SafetyRow
from safevlm.trainer.evaluation import calibrate, predict_rows
from safevlm.trainer.evaluation.head.outcomes import head_outcomes

QUESTIONS = ("Is it yes?", "What is in the picture?", "The answer is no", "How?", "Tell me what it is, please", "yes")


@pytest.fixture(scope="module")
def many_rows():
    """Two rows about each of 40 sets of one to three images, of one to three turns; every other row is risky."""
    draw, rows = random.Random(0), []
    for i in range(80):
        images = [picture(100 + 3 * (i // 2) + k) for k in range(1 + i // 2 % 3)]
        messages = chat(draw.choice(QUESTIONS), len(images))
        for _ in range(draw.randrange(3)):
            messages += [{"role": "assistant", "content": [{"type": "text", "text": "The answer is yes."}]}]
            messages += chat(draw.choice(QUESTIONS), 0)
        rows.append(SafetyRow(f"row-{i}", images, messages, *((i // 2 % 6, 3) if i % 2 else (6, 0))))
    return rows


@pytest.fixture(scope="module")
def sharp_model(model):
    """An untrained head whose scores, categories and levels differ from reading to reading."""
    sharp = copy.deepcopy(model)
    torch.manual_seed(1)
    head = sharp.safety.head
    with torch.no_grad():
        for classifier in (head.level_classifier, head.category_classifier):
            classifier.weight.normal_(std=3.0)
    return sharp


def flagged(model, processor, row, policy) -> bool:
    text = processor.apply_chat_template(row.messages, add_generation_prompt=True)
    inputs = processor(images=row.load_images(), text=[text], return_tensors="pt")
    return bool(model.assess(**inputs, safety_policy=policy).level > 0)


@pytest.mark.parametrize("whole_conversation", [True, False])
def test_the_measured_false_positive_rate_is_the_share_of_harmless_rows_that_assess_flags(
    sharp_model, processor, many_rows, whole_conversation
):
    policy = SafetyPolicy(whole_conversation=whole_conversation)
    predictions = predict_rows(sharp_model, processor, many_rows)
    assert max(len(prediction.level_logits) for prediction in predictions) >= 6  # images x readings
    result = calibrate(predictions, policy, sharp_model.config.labels, target_fpr=0.2, num_resamples=0)
    by_id = {row.row_id: row for row in many_rows}
    for half in (result.fit_half, result.report_half):
        for name, each in result.compared.items():
            clean = [by_id[p.row_id] for p in half if p.level == 0]
            share = sum(flagged(sharp_model, processor, row, each) for row in clean) / len(clean)
            if half is result.report_half:
                assert share == result.report["operating_points"][name]["false_positive_rate"]["value"], name
            elif name == "calibrated":
                assert share <= 0.2
    flags = {name: point["recall"]["value"] for name, point in result.report["operating_points"].items()}
    assert len(set(flags.values())) > 1  # the policies differ on these rows


def test_a_reading_of_the_whole_conversation_counts_only_where_the_policy_asks_for_it(sharp_model):
    two_readings = scored(0.9), scored(0.2)
    row = copy.copy(two_readings[0])
    for name in ("level_logits", "category_logits"):
        object.__setattr__(row, name, sum((getattr(reading, name) for reading in two_readings), ()))
    object.__setattr__(row, "whole_conversation", (True, False))
    for whole_conversation, score in ((True, 0.9), (False, 0.2)):
        outcomes = head_outcomes([row], SafetyPolicy(whole_conversation=whole_conversation), sharp_model.config.labels)
        assert outcomes.scores[0] == pytest.approx(score)
