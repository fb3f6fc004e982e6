"""Models that think before they answer: refusals, hints and labels around an open tag of thoughts."""

import pytest
import torch
from families import build
from generation_case import REFUSAL, assistant, user
from published_templates import THINKING
from tiny import LEVELS, answers, encode, picture, safe_model

from safevlm import SafeVlmProcessor
from safevlm.trainer.data import DataError, SafetyRow
from safevlm.trainer.encoding.encoded_datasets import EncodedDataset
from safevlm.trainer.encoding.row_encoder import RowEncoder, encode_row


@pytest.fixture(scope="module", params=THINKING)
def thinking(request):
    """A model and its processor. Two line feeds are one token of its tokenizer, as in Qwen's."""
    base, processor = build("qwen3_5")
    processor.chat_template = THINKING[request.param]
    processor.tokenizer.add_tokens(["<think>", "</think>", "\n\n"])
    processor = SafeVlmProcessor.from_base(processor)
    return safe_model(base, processor), processor


def row(*messages, level=0):
    images = [picture(i) for i in range(sum(part["type"] == "image" for m in messages for part in m["content"]))]
    return SafetyRow("row-7", images, list(messages), 0 if level else 6, level)


def visible(text):
    """The text that a front end shows when it folds thoughts away."""
    return text.split("</think>")[-1].strip()


def test_a_forced_refusal_is_the_visible_answer(thinking, verdicts):
    model, processor = thinking
    verdicts(model, "high", "none")
    inputs = encode(processor, ["What is in the picture?", "no"], [1, 1])
    output = model.generate(**inputs, max_new_tokens=80)
    refused, answered = answers(processor, output, inputs)
    prompt = processor.decode(inputs["input_ids"][0])
    assert visible(refused) == REFUSAL and REFUSAL not in answered
    assert (prompt + refused).count("<think>") == (prompt + refused).count("</think>")


def test_a_new_refusal_is_visible_too(thinking, verdicts):
    model, processor = thinking
    verdicts(model, "high")
    inputs = encode(processor, ["no"], [1])
    policy = model.resolve_policy().replace(refusals={"en": "Not this."})
    output = model.generate(**inputs, safety_policy=policy, tokenizer=processor.tokenizer, max_new_tokens=40)
    assert visible(answers(processor, output, inputs)[0]) == "Not this."


def test_a_refusal_behind_an_answers_beginning_closes_no_thoughts(thinking, verdicts):
    model, processor = thinking
    verdicts(model, "high")
    for settings in (dict(continue_final_message=True), dict(add_generation_prompt=True, enable_thinking=False)):
        messages = [user("what?", 1), *[assistant("Sure")] * ("continue_final_message" in settings)]
        prompt = processor.apply_chat_template(messages, **settings)
        inputs = processor(images=[picture()], text=[prompt], return_tensors="pt")
        (text,) = answers(processor, model.generate(**inputs, max_new_tokens=80), inputs)
        written = prompt + text
        assert visible(text) == REFUSAL and written.count("<think>") == written.count("</think>")


def test_a_hint_stands_in_the_users_turn_in_training_and_in_generation(thinking, verdicts, monkeypatch):
    model, processor = thinking
    messages = [user("Is it yes?", 1), assistant("no"), user("And here?", 1), assistant("yes")]
    example = row(*messages, level=LEVELS.index("low"))
    trained = EncodedDataset([example], RowEncoder(processor, model.config, hint_probability=1.0))[0]["input_ids"]
    verdicts(model, "low")
    given = {}
    monkeypatch.setattr(model.base, "generate", lambda **call: given.update(call) or call["input_ids"])
    prompt = processor.apply_chat_template(messages[:-1], add_generation_prompt=True)
    model.generate(**processor(images=example.load_images(), text=[prompt], return_tensors="pt"))
    hint = model.resolve_policy().hint("caution", "politics")
    for ids in (trained, given["input_ids"][0]):
        before, after = processor.decode(ids).split(hint)
        assert before.rstrip().endswith("And here?") and after.startswith("<|im_end|>\n<|im_start|>assistant\n")


def test_every_answer_is_supervised_and_no_question_is(thinking):
    model, processor = thinking
    messages = [user("Is it yes?", 1), assistant("no"), user("And here?"), assistant("yes, yes")]
    encoded = encode_row(row(*messages), processor, model.config)
    runs = processor.decode([i for i in encoded["labels"].tolist() if i != -100]).split("<|im_end|>")
    assert [visible(run) for run in runs[:2]] == ["no", "yes, yes"]
    read = processor.decode(encoded["input_ids"][encoded["safety_question_mask"].bool()])
    assert "Is it yes?" in read and "And here?" in read and "yes, yes" not in read


def test_training_and_generation_read_the_same_question(thinking):
    model, processor = thinking
    messages = [user("Is it yes?", 1), assistant("no"), user("And here?"), assistant("yes")]
    encoded = encode_row(row(*messages), processor, model.config)
    prompt = processor.apply_chat_template(messages[:-1], add_generation_prompt=True)
    inputs = processor(images=[picture()], text=[prompt], return_tensors="pt")
    asked = inputs["input_ids"][0][inputs["safety_question_mask"][0].bool()]
    trained = encoded["input_ids"][encoded["safety_question_mask"].bool()]
    assert torch.equal(trained, asked[: len(trained)]) and processor.decode(asked[len(trained) :]) in (
        "",
        "\n",
        "<think>\n",
    )


def test_a_template_that_hides_the_answers_cannot_be_trained_on(processor, model):
    base, hiding = build("llava")
    hiding.chat_template = hiding.chat_template.replace("{{ p['text'] }}", "{{ p['text'] | reverse }}")
    hiding = SafeVlmProcessor.from_base(hiding)
    with pytest.raises(DataError, match="row 'row-7': .* does not mark where the last answer"):
        encode_row(row(user("Is it?", 1), assistant("yes")), hiding, model.config)
