"""Invariant 3: what the safety head's logits depend on, and what they must not depend on."""

import copy

import pytest
import torch
from tiny import chat, encode, picture

QUESTION = "What is in the picture?"


def safety_logits(model, inputs, **kwargs):
    with torch.no_grad():
        output = model(**inputs, **kwargs)
    return torch.cat([output.safety_level_logits, output.safety_category_logits], dim=1)


def assert_same(a, b):
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def differs(a, b):
    return (a - b).abs().max() > 1e-3


def dialogue(processor, answer: str):
    """A training row: prompt, answer, labels that supervise the answer only."""
    messages = chat(QUESTION) + [{"role": "assistant", "content": [{"type": "text", "text": answer}]}]
    prompt = processor.apply_chat_template(chat(QUESTION), add_generation_prompt=True)
    full = processor.apply_chat_template(messages)
    inputs = processor(images=[picture()], text=full, return_tensors="pt")
    prompt_length = processor(images=[picture()], text=prompt, return_tensors="pt")["input_ids"].shape[1]
    labels = inputs["input_ids"].clone()
    labels[:, :prompt_length] = -100
    return inputs, labels


def test_answer_tokens_do_not_change_safety_logits(model, processor):
    reference = safety_logits(model, encode(processor, [QUESTION], [1]))
    for answer in ["yes", "I can't help with this request, it is dangerous."]:
        inputs, labels = dialogue(processor, answer)
        assert_same(safety_logits(model, inputs, labels=labels), reference)


def test_without_labels_the_head_would_read_the_answer(model, processor):
    """Guards the test above: the answer's tokens do matter when nothing marks them."""
    inputs, _ = dialogue(processor, "I can't help with this request, it is dangerous.")
    inputs.pop("safety_question_mask")
    assert differs(safety_logits(model, inputs), safety_logits(model, encode(processor, [QUESTION], [1])))


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("amount", [0, 1, 37])
def test_padding_does_not_change_safety_logits(model, processor, side, amount):
    inputs = encode(processor, [QUESTION], [1])
    reference = safety_logits(model, inputs)
    pad = (amount, 0) if side == "left" else (0, amount)
    per_token = ("input_ids", "attention_mask", "safety_question_mask")
    padded = {**inputs, **{name: torch.nn.functional.pad(inputs[name], pad, value=0) for name in per_token}}
    assert_same(safety_logits(model, padded), reference)
    verdict = model.assess(**{name: value for name, value in padded.items() if name != "attention_mask"})
    assert_same(verdict.level_probabilities, reference[:, :4].softmax(dim=1))  # the mask is made from the padding


def test_batch_neighbours_do_not_change_safety_logits(model, processor):
    questions, images = [QUESTION, "Is it yes? " * 6, "no", "answer"], [1, 2, 0, 1]
    together = safety_logits(model, encode(processor, questions, images))
    for row, seed in ((0, 0), (1, 1), (3, 3)):
        alone = encode(processor, [questions[row]], [images[row]], seed=seed)
        assert_same(safety_logits(model, alone), together[row : row + 1])


def test_bfloat16_is_close_to_float32(model, batch):
    half = copy.deepcopy(model).to(torch.bfloat16)
    expected, found = model.assess(**batch), half.assess(**batch)
    torch.testing.assert_close(found.level_probabilities, expected.level_probabilities, atol=0.02, rtol=0)
    torch.testing.assert_close(found.category_probabilities, expected.category_probabilities, atol=0.02, rtol=0)
    assert found.score.dtype == torch.float32


def test_changing_the_question_changes_safety_logits(model, processor):
    safety = [safety_logits(model, encode(processor, [question], [1])) for question in (QUESTION, "Is it?")]
    assert differs(*safety)


def test_changing_the_image_changes_safety_logits(model, processor):
    safety = [safety_logits(model, encode(processor, [QUESTION], [1], seed=seed)) for seed in (0, 5)]
    assert differs(*safety)


def test_only_the_rows_own_image_counts(model, processor):
    questions = [QUESTION, QUESTION]
    first, second = (encode(processor, questions, [1, 1], seed=seed) for seed in (0, 1))  # images 0, 1 and 1, 2
    first, second = safety_logits(model, first), safety_logits(model, second)
    assert_same(first[1], second[0])
    assert differs(first[0], second[0])


def test_a_rows_verdict_is_that_of_its_worst_image(model, processor):
    inputs = encode(processor, [QUESTION, QUESTION], [3, 1])
    features = model.encode_images(inputs["input_ids"], pixel_values=inputs["pixel_values"])
    prediction = model.predict_safety(inputs["input_ids"], inputs["attention_mask"], features)
    assert prediction.level_logits.shape == (4, 4) and prediction.category_logits.shape == (4, 7)
    level_logits, category_logits, _ = prediction.per_row()
    severity = prediction.level_logits.softmax(dim=1) @ torch.arange(4.0)
    worst = int(severity[:3].argmax())
    assert torch.equal(level_logits[0], prediction.level_logits[worst])
    assert torch.equal(category_logits[0], prediction.category_logits[worst])
    assert torch.equal(level_logits[1], prediction.level_logits[3])


def test_the_verdict_is_that_of_the_image_with_the_strictest_action(model, processor):
    """The image of the highest expected level may be one that the policy allows."""
    inputs = encode(processor, [QUESTION], [2])
    features = model.encode_images(inputs["input_ids"], pixel_values=inputs["pixel_values"])
    prediction = model.predict_safety(inputs["input_ids"], inputs["attention_mask"], features)
    prediction.level_logits = torch.tensor([[0.8, 1e-9, 1e-9, 0.2], [0.49, 0.51, 1e-9, 1e-9]]).log()
    for order in ([0, 1], [1, 0]):
        prediction.level_logits = prediction.level_logits[order]
        verdict = model.apply_policy([prediction], model.resolve_policy("default"))
        assert verdict.actions == ["caution"] and verdict.score.item() == pytest.approx(0.51, abs=1e-3)


def test_the_order_of_a_rows_images_does_not_change_its_verdict(model, processor):
    inputs = encode(processor, [QUESTION], [3])
    turned = dict(inputs, pixel_values=inputs["pixel_values"].flip(0))
    assert_same(safety_logits(model, inputs), safety_logits(model, turned))


def test_rows_without_an_image_are_not_assessed(model, batch):
    verdict = model.assess(**batch)
    assert verdict.assessed.tolist() == [True, True, False]
    assert verdict.score[2] == 0 and verdict.actions[2] == "allow"
    row = verdict.to_list()[2]
    assert row["assessed"] is False and row["level"] is None and row["score"] is None


@pytest.mark.parametrize("policy", ["default", "strict", "off"])
def test_a_batch_without_any_image_is_answered_and_not_assessed(model, processor, base, base_processor, policy):
    inputs = encode(processor, ["hello", "What is the answer?"], [0, 0])
    output = model.generate(**inputs, safety_policy=policy, return_dict_in_generate=True)
    expected = base.generate(**encode(base_processor, ["hello", "What is the answer?"], [0, 0]))
    assert torch.equal(output.sequences, expected)
    assert model.assess(**inputs).assessed.tolist() == [False, False]
    assert output.safety.actions == ["off" if policy == "off" else "allow"] * 2
    assert model(**inputs).safety_level_logits is None


def test_an_image_without_a_question_gets_finite_logits(model):
    token = model.config
    ids = [token.base_config.image_token_id] * 16 + [token.safety_token_id] * token.tokens_per_image
    inputs = {"input_ids": torch.tensor([ids]), "pixel_values": torch.randn(1, 3, 32, 32)}
    assert safety_logits(model, inputs).isfinite().all()
    assert model.assess(**inputs).assessed.all()


def test_probabilities_sum_to_one_and_verdict_and_category_agree(model, batch):
    verdict = model.assess(**batch)[:2]
    torch.testing.assert_close(verdict.level_probabilities.sum(dim=1), torch.ones(2))
    torch.testing.assert_close(verdict.score, 1 - verdict.level_probabilities[:, 0])
    safe = model.config.labels.safe_category_id
    assert torch.equal(verdict.level == 0, verdict.category == safe)


def test_assess_runs_no_language_model(model, batch, monkeypatch):
    monkeypatch.setattr(model.base.model.language_model, "forward", None)
    assert model.assess(**batch).assessed.any()
