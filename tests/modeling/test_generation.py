"""Invariant 4: every decoding strategy gives the same answer, with hints inserted and without."""

import copy
import threading

import pytest
import torch
from tiny import answers, chat, encode, new_tokens, picture, tiny_llava
from transformers import GenerationConfig, TextIteratorStreamer, TextStreamer, WatermarkingConfig

QUESTION = "What is in the picture?"
# "none" is allowed and gets no hint; "low" gets one.
LEVELS = pytest.mark.parametrize("level", ["none", "low"])


def generate(model, inputs, **kwargs):
    return model.generate(**inputs, **{"max_new_tokens": 16, **kwargs})


@pytest.fixture(scope="module")
def single(processor):
    return encode(processor, [QUESTION], [1])


@pytest.fixture
def placements(model, monkeypatch):
    """The inputs that the language model got in its first pass."""
    seen = []
    forward = model.base.model.language_model.forward

    def record(*args, **kwargs):
        seen.append(kwargs["inputs_embeds"])
        return forward(*args, **kwargs)

    monkeypatch.setattr(model.base.model.language_model, "forward", record)
    return seen


@LEVELS
@pytest.mark.parametrize(
    "settings",
    [
        dict(use_cache=False),
        dict(cache_implementation="static"),
        dict(prefill_chunk_size=5),
        dict(prefill_chunk_size=1),
        dict(prompt_lookup_num_tokens=3),
        dict(num_beams=1, return_dict_in_generate=False),
    ],
    ids=lambda settings: next(iter(settings)) + "_" + str(next(iter(settings.values()))),
)
def test_greedy_answers_do_not_depend_on_how_they_are_computed(model, batch, single, verdicts, settings, level):
    inputs = single if "prompt_lookup_num_tokens" in settings else batch  # which takes one row only
    verdicts(model, *[level] * len(inputs["input_ids"]))
    assert torch.equal(generate(model, inputs, **settings), generate(model, inputs))


@LEVELS
@pytest.mark.parametrize("settings", [dict(use_cache=False), dict(cache_implementation="static")])
@pytest.mark.parametrize("beams", [dict(num_beams=3), dict(num_beams=3, do_sample=True), dict(do_sample=True)])
def test_beams_and_samples_do_not_depend_on_the_cache(model, batch, verdicts, settings, beams, level):
    verdicts(model, level, level, level)
    torch.manual_seed(1)
    expected = generate(model, batch, **beams)
    torch.manual_seed(1)
    assert torch.equal(generate(model, batch, **beams, **settings), expected)


@LEVELS
@pytest.mark.parametrize("assistant", ["other", "base"])
def test_assisted_decoding_gives_the_greedy_answer(model, base, single, verdicts, level, assistant):
    verdicts(model, level)
    assistant_model = base if assistant == "base" else tiny_llava(seed=1)
    assert torch.equal(generate(model, single, assistant_model=assistant_model), generate(model, single))


@pytest.mark.parametrize("levels", [("none", "none", "none"), ("low", "none", "none"), ("low", "medium", "none")])
@pytest.mark.parametrize("beams", [1, 3])
def test_batched_answers_equal_single_ones(model, processor, verdicts, levels, beams):
    questions, images = [QUESTION, "Is it yes? " * 4, "no"], [1, 2, 0]
    inputs = encode(processor, questions, images)
    verdicts(model, *levels)
    together = new_tokens(generate(model, inputs, num_beams=beams), inputs)
    for row in range(3):
        alone = encode(processor, [questions[row]], [images[row]], seed=sum(images[:row]))
        verdicts(model, levels[row])
        answer = new_tokens(generate(model, alone, num_beams=beams), alone)[0]
        assert torch.equal(together[row, : len(answer)], answer)


@LEVELS
def test_right_padding_of_a_hinted_batch_is_moved_to_the_left(model, processor, verdicts, level):
    """The base needs left padding; inserting a hint rebuilds the prompt and provides it."""
    verdicts(model, "low", level)
    left = encode(processor, [QUESTION, "no"], [1, 0])
    right = copy.deepcopy(left)
    amount = int((left["attention_mask"][1] == 0).sum())
    for name in ("input_ids", "attention_mask"):
        right[name][1] = left[name][1].roll(-amount)
    assert torch.equal(
        new_tokens(generate(model, right), right)[: 1 + (level == "low")],
        new_tokens(generate(model, left), left)[: 1 + (level == "low")],
    )


def test_forward_and_generate_agree_on_the_first_token(model, batch, verdicts):
    verdicts(model, "none", "none", "none")
    output = generate(model, batch, return_dict_in_generate=True, output_logits=True)
    with torch.no_grad():
        torch.testing.assert_close(output.logits[0], model(**batch).logits[:, -1])


def test_the_hint_changes_what_the_language_model_answers(model, single, verdicts):
    verdicts(model, "low")
    plain = {"hints": {}}
    assert not torch.equal(generate(model, single), generate(model, single, safety_policy=plain))


def test_the_verdict_conditions_the_safety_embeddings(model, single, verdicts, placements):
    silent = {"hints": {}, "forced_refusal": False}
    for level in ("none", "low", "low"):
        verdicts(model, level)
        generate(model, single, safety_policy=silent, max_new_tokens=1)
    none, low, again = placements
    changed = (none != low).any(dim=-1)
    assert torch.equal(changed, single["input_ids"] == model.config.safety_token_id)
    assert torch.equal(low, again)


@pytest.mark.parametrize("chunk", [1, 3, 19, 64])
def test_every_placeholder_gets_its_embedding_however_the_prefill_is_cut(model, batch, verdicts, placements, chunk):
    verdicts(model, "low", "none", "none")
    generate(model, batch, max_new_tokens=1)
    whole = placements.pop()
    generate(model, batch, max_new_tokens=1, prefill_chunk_size=chunk)
    assert torch.equal(torch.cat(placements, dim=1), whole)


def test_guided_decoding_keeps_the_embeddings_of_its_own_prompt(model, single, verdicts, placements):
    """Classifier-free guidance runs a second sequence with its own cache over the placeholders' positions."""
    verdicts(model, "none")
    answer = generate(model, single, guidance_scale=1.5, max_new_tokens=32, min_new_tokens=32)
    guide = placements[2::2]  # prompt, then (guide, answer) in turns, starting with the guide's own prompt
    guide = [placements[1], *placements[3::2]]
    tokens = torch.cat([single["input_ids"][:, -1:], new_tokens(answer, single)], dim=1)
    expected = model.get_input_embeddings()(tokens)[:, : len(guide)]
    assert torch.equal(torch.cat(guide, dim=1), expected)


@LEVELS
@pytest.mark.parametrize("beams", [1, 3])
def test_the_vision_tower_runs_once_and_the_head_once_per_generate(model, batch, verdicts, monkeypatch, level, beams):
    calls = {"vision": 0, "head": 0, "projector": 0}
    for name, module in (
        ("vision", model.base.model.vision_tower),
        ("head", model.safety.head),
        ("projector", model.safety.projector),
    ):

        def counted(*args, _name=name, _forward=module.forward, **kwargs):
            calls[_name] += 1
            return _forward(*args, **kwargs)

        monkeypatch.setattr(module, "forward", counted)
    verdicts(model, level, level, level)
    generate(model, batch, num_beams=beams)
    assert calls == {"vision": 1, "head": 1, "projector": 1}


# -- lengths and configurations --------------------------------------------------------------------------------------


@LEVELS
@pytest.mark.parametrize(
    "settings",
    [
        dict(max_new_tokens=5),
        dict(generation_config=GenerationConfig(max_new_tokens=5, min_new_tokens=5)),
        dict(max_length="+5", min_length="+5", max_new_tokens=None),
        dict(generation_config="length"),
    ],
    ids=["argument", "config", "length", "length_in_config"],
)
def test_a_hint_does_not_shorten_the_answer(model, single, verdicts, level, settings):
    verdicts(model, level)
    length = single["input_ids"].shape[1] + 5
    settings = {name: length if value == "+5" else value for name, value in settings.items()}
    plain = copy.deepcopy(model)
    plain.generation_config.eos_token_id = 300
    if settings.get("generation_config") == "length":
        settings["generation_config"] = GenerationConfig(max_length=length, min_length=length)
        plain.generation_config.max_new_tokens = None
    verdicts(plain, level)
    assert new_tokens(plain.generate(**single, **settings), single).shape == (1, 5)


def test_a_callers_generation_config_is_not_changed(model, single, verdicts):
    verdicts(model, "low")
    plain = copy.deepcopy(model)
    plain.generation_config.max_new_tokens = None
    config = GenerationConfig(max_length=single["input_ids"].shape[1] + 4)
    before = config.to_dict()
    plain.generate(**single, generation_config=config)
    assert config.to_dict() == before


def test_the_attention_mask_may_be_left_out(model, batch, verdicts):
    verdicts(model, "low", "none", "none")
    bare = {name: value for name, value in batch.items() if name != "attention_mask"}
    assert torch.equal(generate(model, bare), generate(model, batch))


def test_the_answer_holds_no_placeholder_token(model, single, verdicts):
    verdicts(model, "none")
    placeholders = {model.config.safety_token_id, model.config.base_config.image_token_id}

    def only_placeholders(batch_id, ids):
        return [*placeholders, 100]

    tokens = new_tokens(generate(model, single, prefix_allowed_tokens_fn=only_placeholders), single)
    assert set(tokens.flatten().tolist()) == {100}


def test_watermarking_runs(model, single, verdicts):
    verdicts(model, "low")
    assert generate(model, single, watermarking_config=WatermarkingConfig(), do_sample=True).shape[0] == 1


# -- streaming -------------------------------------------------------------------------------------------------------


@LEVELS
@pytest.mark.parametrize("skip_prompt", [True, False])
def test_streamed_text_is_the_answer_and_never_the_hint(
    model, processor, single, verdicts, capsys, level, skip_prompt
):
    verdicts(model, level)
    hint = model.resolve_policy().hint("caution", "politics")
    expected = generate(model, single)
    generate(model, single, streamer=TextStreamer(processor.tokenizer, skip_prompt=skip_prompt))
    streamed = capsys.readouterr().out.rstrip("\n")
    assert hint not in streamed
    shown = new_tokens(expected, single) if skip_prompt else expected
    assert streamed == processor.tokenizer.decode(shown[0])


@pytest.mark.parametrize("level", ["none", "low", "high"])
def test_an_iterator_streamer_in_a_thread_gives_the_answer(model, processor, single, verdicts, level):
    verdicts(model, level)
    expected = answers(processor, generate(model, single, max_new_tokens=60), single)[0]
    streamer = TextIteratorStreamer(processor.tokenizer, skip_prompt=True, skip_special_tokens=True, timeout=60)
    thread = threading.Thread(target=generate, args=(model, single), kwargs=dict(streamer=streamer, max_new_tokens=60))
    thread.start()
    streamed = "".join(streamer)
    thread.join()
    assert streamed == expected


# -- concurrency -----------------------------------------------------------------------------------------------------


def test_concurrent_calls_do_not_mix(model, processor):
    inputs = [encode(processor, [f"{QUESTION} {i}"], [1 + i % 2], seed=10 * i) for i in range(4)]
    policies = [
        "default",
        "off",
        {"level_actions": dict.fromkeys(("none", "low", "medium", "high"), "caution")},
        "paper",
    ]
    expected = [generate(model, x, safety_policy=policy) for x, policy in zip(inputs, policies, strict=True)]
    outputs = [[] for _ in inputs]
    start = threading.Barrier(len(inputs))

    def run(i):
        start.wait()
        for _ in range(4):
            outputs[i].append(generate(model, inputs[i], safety_policy=policies[i]))

    threads = [threading.Thread(target=run, args=(i,)) for i in range(len(inputs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i, answer in enumerate(expected):
        assert len(outputs[i]) == 4 and all(torch.equal(other, answer) for other in outputs[i])


def test_two_models_on_one_thread_do_not_mix(model, processor, single):
    other = copy.deepcopy(model)
    torch.nn.init.normal_(other.safety.embeddings.action.weight, std=5.0)
    first, second = generate(model, single), generate(other, single)
    assert torch.equal(generate(model, single), first) and torch.equal(generate(other, single), second)


def test_a_continued_answer_keeps_its_beginning_and_the_hint_goes_before_it(model, processor, verdicts, monkeypatch):
    verdicts(model, "low")
    messages = chat(QUESTION) + [{"role": "assistant", "content": [{"type": "text", "text": "The answer"}]}]
    prompt = processor.apply_chat_template(messages, continue_final_message=True)
    inputs = processor(images=[picture()], text=prompt, return_tensors="pt")
    given = {}
    monkeypatch.setattr(model.base, "generate", lambda **kwargs: given.update(kwargs) or kwargs["input_ids"])
    generate(model, inputs)
    text = processor.tokenizer.decode(given["input_ids"][0])
    hint = model.resolve_policy().hint("caution", "politics")
    assert text.endswith(f"{hint} ASSISTANT: The answer")
