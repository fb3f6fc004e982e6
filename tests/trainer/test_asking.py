"""Asking and loading: one call for SafeVLMs and bases, whatever the batch."""

import pytest
import torch
from tiny import picture

from safevlm.trainer.asking import Answer, ask, assess, question_chat, verdict_line
from safevlm.trainer.loading import load_checkpoint

QUESTIONS = ("What is in the picture?", "Is it yes?", "no", "The answer is yes. What is in the picture?")
CONVERSATIONS = [
    (question_chat(question, num_images), [picture(10 * i + k) for k in range(num_images)])
    for i, (question, num_images) in enumerate(zip(QUESTIONS, (1, 2, 0, 1), strict=True))
]


@pytest.mark.parametrize("batch_size", [1, 2, None])
def test_answers_do_not_depend_on_the_batch_and_keep_their_order(model, processor, batch_size):
    alone = [ask(model, processor, [conversation], max_new_tokens=8)[0] for conversation in CONVERSATIONS]
    together = ask(model, processor, CONVERSATIONS, batch_size=batch_size, max_new_tokens=8)
    assert [answer.text for answer in together] == [answer.text for answer in alone]
    assert [answer.verdict["action"] for answer in together] == [answer.verdict["action"] for answer in alone]


def test_assess_gives_the_verdict_of_the_answer(model, processor):
    [answer] = ask(model, processor, CONVERSATIONS[:1], "strict", max_new_tokens=2)
    assert assess(model, processor, *CONVERSATIONS[0], policy="strict") == answer.verdict


def test_a_base_has_no_verdict_and_takes_no_policy(base, base_processor):
    [answer] = ask(base, base_processor, CONVERSATIONS[:1], max_new_tokens=2)
    assert answer == Answer(answer.text, verdict=None)
    with pytest.raises(ValueError, match="`policy` 'strict' needs a SafeVLM, but this is a llava model"):
        ask(base, base_processor, CONVERSATIONS[:1], "strict")


def test_no_question_gives_no_answer(model, processor):
    assert ask(model, processor, []) == []


@pytest.mark.parametrize(("name", "model_type", "policy"), [("safe", "safevlm", "off"), ("base", "llava", None)])
def test_a_saved_model_is_loaded_with_its_processor(model_folders, base, base_processor, name, model_type, policy):
    model, processor = load_checkpoint(str(model_folders / name), "cpu", dtype="float32")
    assert model.config.model_type == model_type
    assert model.dtype == torch.float32 and not model.training
    texts = [answer.text for answer in ask(model, processor, CONVERSATIONS, policy, max_new_tokens=8)]
    assert texts == [answer.text for answer in ask(base, base_processor, CONVERSATIONS, max_new_tokens=8)]


def test_an_unknown_dtype_is_refused_before_anything_is_loaded():
    with pytest.raises(ValueError, match="`dtype` must be 'auto', 'float32', .*got 'floaty'"):
        load_checkpoint("no/such/model", dtype="floaty")


def test_a_verdict_line_says_what_there_is_to_say():
    verdict = {"action": "refuse", "category": "politics", "level": "high", "score": 0.99812}
    assert verdict_line(verdict) == "refuse; politics, high; risk 0.998"
    assert verdict_line({"action": "allow", "category": None}) == "allow; not assessed"
    assert verdict_line({"action": "refuse", "category": None, "error": "It failed."}) == "refuse; It failed."
