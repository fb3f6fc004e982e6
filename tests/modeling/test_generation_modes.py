"""Every generation mode: the base's answer with the policy off, the policy's answer with it on."""

import asyncio
import threading

import pytest
import torch
from generation_case import FAMILIES, REFUSAL, Case, answer
from tiny import answers, new_tokens, tiny_tokenizer
from transformers import (
    AsyncTextIteratorStreamer,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteria,
    StoppingCriteriaList,
)


class Shift(LogitsProcessor):
    """A caller's processor that prefers other tokens."""

    def __call__(self, input_ids, scores):
        return scores.roll(7, dims=1)


class StopAfter(StoppingCriteria):
    def __init__(self, tokens):
        self.calls, self.tokens = 0, tokens

    def __call__(self, input_ids, scores, **kwargs):
        self.calls += 1
        return torch.full((len(input_ids),), self.calls >= self.tokens)


# Built anew for each call, since some arguments hold state.
BATCHED = {
    "greedy": lambda: {},
    "greedy_with_scores": lambda: dict(return_dict_in_generate=True, output_scores=True, output_logits=True),
    "sampled": lambda: dict(do_sample=True, temperature=1.3, top_k=0),
    "nucleus": lambda: dict(do_sample=True, top_p=0.8, min_p=0.01, typical_p=0.9),
    "samples": lambda: dict(do_sample=True, num_return_sequences=3),
    "beams": lambda: dict(num_beams=3),
    "returned_beams": lambda: dict(num_beams=4, num_return_sequences=2, length_penalty=2.0),
    "sampled_beams": lambda: dict(num_beams=3, do_sample=True, num_return_sequences=2),
    "penalised": lambda: dict(repetition_penalty=1.5, no_repeat_ngram_size=2),
    "uncached": lambda: dict(use_cache=False),
    "static": lambda: dict(cache_implementation="static"),
    "hybrid": lambda: dict(cache_implementation="hybrid"),
    "chunked": lambda: dict(prefill_chunk_size=7),
    "chunked_static": lambda: dict(prefill_chunk_size=7, cache_implementation="static"),
    "processor": lambda: dict(logits_processor=LogitsProcessorList([Shift()])),
    "criterion": lambda: dict(stopping_criteria=StoppingCriteriaList([StopAfter(4)])),
    "time": lambda: dict(max_time=60.0),
    "lengths": lambda: dict(min_new_tokens=6, max_new_tokens=6),
    "synced": lambda: dict(synced_gpus=False),
    "config": lambda: dict(generation_config=GenerationConfig(max_new_tokens=5, do_sample=True, temperature=2.0)),
}
SINGLE = {
    "assisted": lambda case: dict(assistant_model=Case(case.family).base),
    "assisted_by_a_safevlm": lambda case: dict(assistant_model=case.model),
    "sampled_assisted": lambda case: dict(assistant_model=case.base, do_sample=True),
    "offloaded": lambda case: dict(cache_implementation="offloaded"),
}


@pytest.fixture(scope="module", params=FAMILIES)
def case(request):
    return Case(request.param)


def settings_of(mode, case):
    return BATCHED[mode]() if mode in BATCHED else SINGLE[mode](case)


def skip_what_needs_a_gpu(mode):
    if mode == "offloaded" and not torch.cuda.is_available():
        pytest.skip("transformers' offloaded caches need CUDA")


@pytest.mark.parametrize("mode", [*BATCHED, *SINGLE])
def test_policy_off_is_the_base_bit_for_bit(case, mode):
    skip_what_needs_a_gpu(mode)
    images = (1, 2, 0) if mode in BATCHED else (1,)
    inputs, base_inputs = case.inputs(*images), case.base_inputs(*images)
    actual = answer(case.model, inputs, safety_policy="off", **settings_of(mode, case))
    settings = settings_of(mode, case)
    if "assistant_model" in settings:
        settings["assistant_model"] = getattr(settings["assistant_model"], "base", settings["assistant_model"])
    assert torch.equal(actual, answer(case.base, base_inputs, **settings))


def test_scores_with_the_policy_off_are_the_bases(case):
    settings = dict(return_dict_in_generate=True, output_scores=True, output_logits=True, num_beams=2)
    actual = case.model.generate(**case.inputs(1, 2, 0), safety_policy="off", **settings)
    expected = case.base.generate(**case.base_inputs(1, 2, 0), **settings)
    for name in ("scores", "logits", "sequences_scores", "beam_indices"):
        a, b = getattr(actual, name), getattr(expected, name)
        assert torch.equal(torch.stack(a), torch.stack(b)) if isinstance(a, tuple) else torch.equal(a, b)


# test_forced_refusal.py has more, with LLaVA.
REFUSED = ["greedy", "samples", "returned_beams", "chunked_static", "criterion", "config", *SINGLE]


@pytest.mark.parametrize("mode", REFUSED)
def test_a_refused_row_gets_the_refusal(case, mode, verdicts):
    skip_what_needs_a_gpu(mode)
    images = (1, 2, 0) if mode in BATCHED else (1,)
    inputs = case.inputs(*images)
    verdicts(case.model, *("high", "none", "none")[: len(images)])
    settings = settings_of(mode, case)
    if mode not in ("criterion", "config"):
        settings["max_new_tokens"] = 80
    tokens = answer(case.model, inputs, **settings)
    copies = len(tokens) // len(images)
    texts = case.processor.batch_decode(tokens, skip_special_tokens=True)
    for row, text in enumerate(texts):
        refused = row < copies
        complete = "max_new_tokens" in settings and settings["max_new_tokens"] == 80
        assert (text.strip() == REFUSAL if complete else REFUSAL.startswith(text.strip())) is refused


@pytest.mark.parametrize(
    "settings",
    [
        dict(penalty_alpha=0.6, top_k=4),
        dict(dola_layers="high"),
        dict(num_beams=4, num_beam_groups=2, diversity_penalty=1.0),
        dict(num_beams=3, force_words_ids=[[100]]),
    ],
    ids=["contrastive_search", "dola", "group_beam_search", "constrained_beam_search"],
)
@pytest.mark.parametrize("policy", ["off", "default"])
def test_what_transformers_moved_to_the_hub_is_refused_as_by_the_base(case, settings, policy):
    messages = []
    for generate in (
        lambda: case.base.generate(**case.base_inputs(1), **settings),
        lambda: case.model.generate(**case.inputs(1), **settings, safety_policy=policy),
    ):
        with pytest.raises(ValueError, match="requires `trust_remote_code=True`.*transformers-community/") as error:
            generate()
        messages.append(str(error.value))
    assert messages[0] == messages[1]


def test_guided_decoding_with_the_policy_off_is_the_bases_and_refuses_with_it_on(verdicts):
    """Not with Qwen: there transformers' guidance fails in the base, too."""
    case = Case("llava")
    negative = case.processor.tokenizer("no no no", return_tensors="pt")["input_ids"]
    for settings in (dict(guidance_scale=1.5), dict(guidance_scale=1.5, negative_prompt_ids=negative)):
        expected = answer(case.base, case.base_inputs(1), **settings)
        assert torch.equal(answer(case.model, case.inputs(1), safety_policy="off", **settings), expected)
        verdicts(case.model, "high")
        tokens = answer(case.model, case.inputs(1), max_new_tokens=80, **settings)
        assert case.processor.batch_decode(tokens, skip_special_tokens=True)[0].strip() == REFUSAL


def test_a_negative_prompt_of_the_prompts_length_is_not_edited(verdicts, monkeypatch):
    case = Case("llava")
    verdicts(case.model, "low")  # inserts a hint
    inputs = case.inputs(1)
    negative = torch.full_like(inputs["input_ids"], 50)
    given = {}
    monkeypatch.setattr(case.model.base, "generate", lambda **call: given.update(call) or call["input_ids"])
    case.model.generate(**inputs, guidance_scale=1.5, negative_prompt_ids=negative)
    assert given["negative_prompt_ids"] is negative and given["input_ids"].shape[1] > negative.shape[1]


def text_only_assistant(case, vocab_size=None):
    torch.manual_seed(0)
    size = dict(hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
    vocab_size = vocab_size or case.base.config.get_text_config().vocab_size
    return LlamaForCausalLM(LlamaConfig(**size, vocab_size=vocab_size)).eval()


@pytest.mark.parametrize("level", ["none", "low", "high"])
def test_a_text_only_assistant_drafts_and_does_not_decide(verdicts, level):
    case = Case("llava")
    verdicts(case.model, level)
    inputs = case.inputs(1)
    expected = answer(case.model, inputs, max_new_tokens=40)
    assert torch.equal(
        answer(case.model, inputs, max_new_tokens=40, assistant_model=text_only_assistant(case)), expected
    )


@pytest.mark.parametrize("level", ["none", "high"])
def test_an_assistant_with_another_tokenizer_drafts_and_does_not_decide(verdicts, level):
    """It counts the prompt in its own tokens, so its drafts may be rejected; the answer stays the same."""
    case = Case("llava")
    verdicts(case.model, level)
    inputs = case.inputs(1)
    expected = answer(case.model, inputs, max_new_tokens=40)
    other = tiny_tokenizer(("<image>", "<other>"))
    actual = answer(
        case.model,
        inputs,
        max_new_tokens=40,
        assistant_model=text_only_assistant(case, vocab_size=400),
        tokenizer=case.processor.tokenizer,
        assistant_tokenizer=other,
    )
    assert torch.equal(actual, expected)


@pytest.mark.parametrize("level", ["none", "high"])
def test_prompt_lookup_does_not_copy_placeholders(case, verdicts, level):
    """The base fails where it copies image tokens from its prompt into the answer; here they are forbidden."""
    verdicts(case.model, level)
    inputs = case.inputs(1)
    settings = dict(max_new_tokens=70)
    expected = answer(case.model, inputs, **settings)
    assert torch.equal(answer(case.model, inputs, **settings, prompt_lookup_num_tokens=4), expected)


@pytest.mark.parametrize("level", ["none", "low", "high"])
def test_an_async_streamer_gives_the_answer(case, verdicts, level):
    verdicts(case.model, level)
    inputs = case.inputs(1)
    expected = answers(case.processor, case.model.generate(**inputs, max_new_tokens=60), inputs)[0]

    async def stream():
        streamer = AsyncTextIteratorStreamer(case.processor.tokenizer, skip_prompt=True, skip_special_tokens=True)
        thread = threading.Thread(
            target=case.model.generate, kwargs=dict(inputs, streamer=streamer, max_new_tokens=60)
        )
        thread.start()
        text = "".join([piece async for piece in streamer])
        thread.join()
        return text

    assert asyncio.run(stream()) == expected


class Listener:
    """A streamer that keeps what it is given, in order."""

    def __init__(self):
        self.given = []

    def put_safety(self, verdict):
        self.given.append(verdict)

    def put(self, value):
        self.given.append("tokens")

    def end(self):
        pass


@pytest.mark.parametrize("level", ["none", "low", "high"])
def test_a_streamer_gets_the_verdict_once_before_the_first_token(case, verdicts, level):
    verdicts(case.model, level)
    inputs, listener = case.inputs(1), Listener()
    case.model.generate(**inputs, streamer=listener, max_new_tokens=3)
    verdict, *tokens = listener.given
    assert verdict.to_list() == case.model.assess(**inputs).to_list() and set(tokens) == {"tokens"}


def test_a_streamer_gets_no_verdict_with_the_policy_off(case):
    listener = Listener()
    case.model.generate(**case.inputs(1), streamer=listener, max_new_tokens=3, safety_policy="off")
    assert set(listener.given) == {"tokens"}


def test_a_streamer_with_beams_is_refused_as_by_the_base(case):
    streamer = AsyncTextIteratorStreamer.__new__(AsyncTextIteratorStreamer)
    with pytest.raises(ValueError, match="`streamer` cannot be used with beam search"):
        case.model.generate(**case.inputs(1), num_beams=2, streamer=streamer)


def test_a_decoding_method_that_ignores_the_refusal_is_an_error(case, verdicts):
    def always(model, input_ids, logits_processor, stopping_criteria, generation_config, **kwargs):
        return torch.cat([input_ids, torch.full_like(input_ids[:, :3], 100)], dim=1)

    verdicts(case.model, "none")
    assert answer(case.model, case.inputs(1), custom_generate=always).tolist() == [[100] * 3]
    verdicts(case.model, "high")
    with pytest.raises(RuntimeError, match="something other than the forced refusal"):
        case.model.generate(**case.inputs(1), custom_generate=always)


def test_position_ids_are_refused(case):
    inputs = case.inputs(1)
    with pytest.raises(ValueError, match="`position_ids` cannot be passed to `generate`"):
        case.model.generate(**inputs, position_ids=torch.arange(inputs["input_ids"].shape[1])[None])


def test_settings_resolve_as_in_the_base(case):
    """An argument precedes the passed configuration, which precedes the model's own."""
    inputs, base_inputs = case.inputs(1, 2, 0), case.base_inputs(1, 2, 0)
    for settings in (
        dict(generation_config=GenerationConfig(max_new_tokens=3)),
        dict(generation_config=GenerationConfig(max_new_tokens=3), max_new_tokens=5),
        dict(generation_config=GenerationConfig(num_beams=2), eos_token_id=None, max_new_tokens=4),
        dict(max_new_tokens=None, max_length=200, eos_token_id=None),
    ):
        actual = case.model.generate(**inputs, **settings, safety_policy="off")
        assert torch.equal(
            new_tokens(actual, inputs), new_tokens(case.base.generate(**base_inputs, **settings), base_inputs)
        )
