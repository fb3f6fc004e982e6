"""Asking systems: the same prompts for base and SafeVLM, verdicts beside answers, and the log a resumed run reads."""

import json

import pytest
from families import build
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import chat, picture
from transformers import ShieldGemma2Config, ShieldGemma2ForImageClassification, ShieldGemma2Processor

from safevlm import SafeVlmProcessor
from safevlm.trainer.evaluation.benchmarks.answer_log import AnswerLog
from safevlm.trainer.evaluation.benchmarks.answering import Answerer
from safevlm.trainer.evaluation.benchmarks.guard_models import ShieldGemmaGuard, TextVerdictGuard, load_guard

CONVERSATIONS = [
    (chat("What is in the picture?"), [picture(0)]),
    (chat("Is it yes?", images=2), [picture(1), picture(2)]),
    (chat("no", images=0), []),
    (chat("The answer is yes. What is in the picture?"), [picture(3)]),
]


@pytest.fixture(scope="module")
def base_answerer(base, base_processor):
    return Answerer(base, SafeVlmProcessor.from_base(base_processor, tokens_per_image=0))


class StubGuard:
    """Flags questions that contain "Is it"."""

    def check(self, question, images):
        flagged = "Is it" in question
        return {"guard": "StubGuard", "flagged": flagged, "category": "S9" if flagged else None}


def test_a_base_is_asked_exactly_as_by_its_own_processor(base, base_processor, base_answerer):
    messages, images = CONVERSATIONS[0]
    prompt = base_processor.apply_chat_template(messages, add_generation_prompt=True)
    inputs = base_processor(images=images, text=prompt, return_tensors="pt")
    expected = base.generate(**inputs, do_sample=False, max_new_tokens=8)[0, inputs["input_ids"].shape[1] :]
    [answer] = base_answerer.answer([CONVERSATIONS[0]], max_new_tokens=8)
    assert answer.text == base_processor.decode(expected, skip_special_tokens=True).strip()
    assert answer.verdict is None


def test_batched_answers_equal_single_ones(model, processor):
    answerer = Answerer(model, processor)
    together = answerer.answer(CONVERSATIONS, max_new_tokens=8)
    alone = [answerer.answer([conversation], max_new_tokens=8)[0] for conversation in CONVERSATIONS]
    assert [answer.text for answer in together] == [answer.text for answer in alone]
    assert len({answer.text for answer in together}) > 1


def test_a_safe_model_with_the_policy_off_answers_like_its_base(model, processor, base_answerer):
    off = Answerer(model, processor, policy="off").answer(CONVERSATIONS, max_new_tokens=8)
    assert [a.text for a in off] == [a.text for a in base_answerer.answer(CONVERSATIONS, max_new_tokens=8)]


def test_the_verdict_is_kept_beside_the_answer(model, processor, verdicts):
    verdicts(model, "high", category="politics")
    [answer] = Answerer(model, processor).answer([CONVERSATIONS[0]], max_new_tokens=64)
    assert answer.text.startswith("I can't help with this request")
    assert (answer.verdict["action"], answer.verdict["level"]) == ("refuse", "high")


def test_a_prefix_changes_the_prompt_of_the_first_user_turn_only(base, base_processor):
    processor = SafeVlmProcessor.from_base(base_processor, tokens_per_image=0)
    seen = []
    template = processor.apply_chat_template
    processor.apply_chat_template = lambda messages, **kwargs: seen.append(messages) or template(messages, **kwargs)
    Answerer(base, processor, prefix="Be careful.").answer([CONVERSATIONS[0]], max_new_tokens=2)
    assert seen[0][0]["content"] == [
        {"type": "image"},
        {"type": "text", "text": "Be careful.\n\n"},
        {"type": "text", "text": "What is in the picture?"},
    ]
    assert CONVERSATIONS[0][0] == chat("What is in the picture?")


def test_a_policy_for_a_plain_base_is_refused(base, base_processor):
    with pytest.raises(ValueError, match="`policy` 'strict' needs a SafeVLM, but this is a llava model"):
        Answerer(base, base_processor, policy="strict")


def test_stop_strings_end_answers(base_answerer):
    [whole] = base_answerer.answer([CONVERSATIONS[0]], max_new_tokens=8)
    [cut] = base_answerer.answer([CONVERSATIONS[0]], until=[whole.text[2:4]], max_new_tokens=8)
    assert cut.text == whole.text[: whole.text.index(whole.text[2:4])].strip()


def test_sampling_settings_without_sampling_change_nothing(base_answerer):
    plain = base_answerer.answer(CONVERSATIONS[:1], max_new_tokens=8)
    assert base_answerer.answer(CONVERSATIONS[:1], max_new_tokens=8, temperature=0.0, top_p=1.0) == plain


def test_a_guarded_base_refuses_what_the_guard_flags_and_answers_the_rest(base, base_answerer):
    guarded = Answerer(base, base_answerer.processor, guard=StubGuard())
    plain = base_answerer.answer(CONVERSATIONS, max_new_tokens=8)
    for answer, unguarded, (messages, _) in zip(
        guarded.answer(CONVERSATIONS, max_new_tokens=8), plain, CONVERSATIONS, strict=True
    ):
        if messages == CONVERSATIONS[1][0]:
            assert answer.text == "I can't help with this request: it involves S9."
            assert answer.verdict["flagged"]
        else:
            assert answer.text == unguarded.text and answer.verdict["flagged"] is False


@pytest.mark.parametrize("flagged", [True, None])
def test_what_a_guard_flags_or_has_no_verdict_on_is_never_answered(base, base_answerer, flagged):
    class Silent:
        def check(self, question, images):
            return {"guard": "Silent", "flagged": flagged, "category": None, "reply": "I am not sure."}

    for answer in Answerer(base, base_answerer.processor, guard=Silent()).answer(CONVERSATIONS, max_new_tokens=8):
        assert answer.text == "I can't help with this request: it involves unsafe content."
        assert answer.verdict["flagged"] is flagged and answer.verdict["reply"] == "I am not sure."


def test_a_random_model_as_a_text_guard_gives_no_verdict_and_says_so(base, base_processor):
    verdict = TextVerdictGuard(base, base_processor, max_new_tokens=4).check("What is it?", [picture(0)])
    assert verdict["flagged"] is None and isinstance(verdict["reply"], str)


def test_the_log_keeps_answers_over_a_kill_in_the_middle_of_a_line(tmp_path):
    record = {"task": "own", "doc_id": 0, "prompt": "Is it?", "answer": "It is. ☃", "verdict": {"action": "allow"}}
    AnswerLog(tmp_path / "answers.jsonl").add([record, {**record, "doc_id": 1}])
    with open(tmp_path / "answers.jsonl", "a") as file:
        file.write(json.dumps({**record, "doc_id": 2})[:20])
    log = AnswerLog(tmp_path / "answers.jsonl")
    assert log.find("own", 1, "Is it?") == {**record, "doc_id": 1}
    assert log.find("own", 2, "Is it?") is None
    log.add([{**record, "doc_id": 2}])
    assert len(AnswerLog(tmp_path / "answers.jsonl").records) == 3


def test_the_log_refuses_an_item_whose_prompt_has_changed(tmp_path):
    log = AnswerLog(tmp_path / "answers.jsonl")
    log.add([{"task": "own", "doc_id": 0, "prompt": "Is it?", "answer": "yes", "verdict": None}])
    with pytest.raises(ValueError, match="item 0 of 'own' was answered for the prompt 'Is it\\?'.*another --output"):
        log.find("own", 0, "Was it?")


def test_the_log_names_the_line_that_is_no_record(tmp_path):
    (tmp_path / "answers.jsonl").write_text('{"task": "own"}\n')
    with pytest.raises(ValueError, match="answers.jsonl, line 1"):
        AnswerLog(tmp_path / "answers.jsonl")


@settings(max_examples=20, deadline=None)
@given(st.text(max_size=30).filter(lambda text: text.encode(errors="replace").decode() == text))
def test_any_answer_comes_back_from_the_log(tmp_path_factory, text):
    path = tmp_path_factory.mktemp("log") / "answers.jsonl"
    record = {"task": "own", "doc_id": 0, "prompt": text, "answer": text, "verdict": None}
    AnswerLog(path).add([record])
    assert AnswerLog(path).find("own", 0, text) == record


@pytest.fixture(scope="module")
def shield_gemma():
    """A tiny random ShieldGemma 2 with its real processor."""
    base, processor = build("gemma3")
    config = ShieldGemma2Config(
        text_config=base.config.text_config,
        vision_config=base.config.vision_config,
        mm_tokens_per_image=4,
        boi_token_index=base.config.boi_token_index,
        eoi_token_index=base.config.eoi_token_index,
        image_token_index=base.config.image_token_index,
        yes_token_index=processor.tokenizer.convert_tokens_to_ids("y"),
        no_token_index=processor.tokenizer.convert_tokens_to_ids("n"),
    )
    return ShieldGemma2ForImageClassification(config).eval(), ShieldGemma2Processor(
        image_processor=processor.image_processor,
        tokenizer=processor.tokenizer,
        chat_template=processor.chat_template,
        image_seq_length=4,
    )


def test_shield_gemma_flags_by_its_worst_policy_over_all_images(shield_gemma):
    pictures = [picture(0), picture(1)]
    model, processor = shield_gemma
    inputs = processor(images=pictures, return_tensors="pt")
    yes = model(**inputs).probabilities[:, 0].tolist()  # (2 images * 3 policies,)
    assert len(yes) == 6 and len(set(yes)) > 1
    worst = max(yes)
    verdict = ShieldGemmaGuard(model, processor, threshold=worst - 1e-4).check("What is it?", pictures)
    assert verdict["flagged"] and verdict["score"] == pytest.approx(worst, abs=1e-6)
    assert verdict["category"] == list(processor.policy_definitions)[yes.index(worst) % 3]
    milder = ShieldGemmaGuard(model, processor, threshold=worst + 1e-4).check("What is it?", pictures)
    assert milder["flagged"] is False and milder["category"] is None


def test_shield_gemma_loads_as_a_guard_and_flags_nothing_without_an_image(shield_gemma, tmp_path):
    for part in shield_gemma:
        part.save_pretrained(tmp_path)
    guard = load_guard(str(tmp_path), "cpu")
    assert isinstance(guard, ShieldGemmaGuard)
    assert guard.check("What is it?", [])["flagged"] is False
    assert guard.check("What is it?", [picture(0)])["score"] == pytest.approx(
        ShieldGemmaGuard(*shield_gemma).check("What is it?", [picture(0)])["score"], abs=1e-5
    )
