"""A chat continued from a cache gets the same answer as without one."""

import copy

import pytest
import torch
from generation_case import FAMILIES, QUESTION, Case, answer
from tiny import encode, picture
from transformers import DynamicCache, LogitsProcessor, LogitsProcessorList, StaticCache

import safevlm.generation_safevlm as generation
from safevlm.cached_prompt import uncached_features


@pytest.fixture(scope="module", params=FAMILIES)
def case(request):
    return Case(request.param)


@pytest.fixture
def kept(monkeypatch):
    """How many tokens of each call's prompt came from its cache."""
    seen = []
    reuse = generation.reuse_cache
    monkeypatch.setattr(generation, "reuse_cache", lambda *args: seen.append(reuse(*args)) or seen[-1])
    return seen


def first_turn(case, images=1, policy=None, **kwargs):
    inputs = encode(case.processor, [QUESTION], [images])
    output = case.model.generate(
        **inputs, max_new_tokens=8, return_dict_in_generate=True, safety_policy=policy, **kwargs
    )
    return inputs, output


def next_turn(case, inputs, sequences, text="Is it?", new_picture=False):
    """Inputs of the whole conversation with one more question, with or without a picture."""
    text = TURNS[case.family].format(text)
    image = case.processor.image_token * new_picture
    if new_picture and "qwen" in case.family:
        image = f"<|vision_start|>{image}<|vision_end|>"
    more = case.processor(text=[image + text], images=[picture(7)] if new_picture else None, return_tensors="pt")
    joined = {name: value for name, value in inputs.items() if name != "safety_question_mask"}
    joined["input_ids"] = torch.cat([sequences, more["input_ids"].expand(len(sequences), -1)], dim=1)
    answer_length = sequences.shape[1] - inputs["attention_mask"].shape[1]
    ones = inputs["attention_mask"].new_ones(len(sequences), answer_length + more["input_ids"].shape[1])
    joined["attention_mask"] = torch.cat([inputs["attention_mask"], ones], dim=1)
    if "mm_token_type_ids" in joined:
        middle = joined["mm_token_type_ids"].new_zeros(len(sequences), answer_length)
        parts = [joined["mm_token_type_ids"], middle, more["mm_token_type_ids"].expand(len(sequences), -1)]
        joined["mm_token_type_ids"] = torch.cat(parts, dim=1)
    if new_picture:
        for name in ("pixel_values", "image_grid_thw"):
            if name in joined:
                joined[name] = torch.cat([joined[name], more[name]])
    return joined


LEVELS = ["none", "low", "medium", "high"]
TURNS = {"llava": " USER: {} ASSISTANT:", "qwen2_5_vl": "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"}


@pytest.mark.parametrize("policy", [None, "off"])
@pytest.mark.parametrize("others", [0, 2])
def test_another_chat_between_the_turns_changes_nothing(case, verdicts, kept, policy, others):
    """Qwen's base keeps the positions after pictures in the model, not in the cache."""
    verdicts(case.model, "none")
    inputs, output = first_turn(case, policy=policy)
    inputs = next_turn(case, inputs, output.sequences)
    expected = answer(case.model, inputs, safety_policy=policy)
    first_turn(case, images=others, policy=policy)
    actual = answer(case.model, inputs, safety_policy=policy, past_key_values=output.past_key_values)
    assert kept[-1] and torch.equal(actual, expected)


@pytest.mark.parametrize("first", LEVELS[:3])
@pytest.mark.parametrize("second", LEVELS)
def test_the_next_turn_with_a_cache_is_the_next_turn_without(case, verdicts, kept, first, second):
    verdicts(case.model, first)
    inputs, output = first_turn(case)
    inputs = next_turn(case, inputs, output.sequences)
    verdicts(case.model, second)
    expected = answer(case.model, inputs)
    actual = answer(case.model, inputs, past_key_values=output.past_key_values)
    assert torch.equal(actual, expected)
    if first == second == "none":  # nothing was cut
        assert kept[-1] == output.sequences.shape[1] - 1
    elif first == second:  # everything before the hint of the first turn
        assert 0 < kept[-1] < output.sequences.shape[1] - 8
    else:  # everything before the first safety embedding, which depends on the verdict
        assert kept[-1] == (inputs["input_ids"][0] == case.model.config.safety_token_id).nonzero()[0]


@pytest.mark.parametrize("level", ["none", "low", "high"])
def test_a_new_picture_in_a_later_turn_is_seen(case, verdicts, kept, level):
    verdicts(case.model, "none")
    inputs, output = first_turn(case)
    inputs = next_turn(case, inputs, output.sequences, new_picture=True)
    verdicts(case.model, level)
    expected = answer(case.model, inputs)
    assert torch.equal(answer(case.model, inputs, past_key_values=output.past_key_values), expected)
    assert kept[-1] > 0


@pytest.mark.parametrize("settings", [dict(num_beams=3), dict(do_sample=True), dict(prefill_chunk_size=5)])
def test_any_decoding_continues_from_a_cache(case, verdicts, kept, settings):
    """transformers does not repeat a cache's rows for beams, so the call starts from scratch."""
    verdicts(case.model, "none")
    inputs, output = first_turn(case)
    inputs = next_turn(case, inputs, output.sequences, new_picture=True)
    expected = answer(case.model, inputs, **settings)
    cache = output.past_key_values
    if "num_beams" in settings:
        cache = case.model.generate(
            **first_turn(case)[0], num_beams=3, max_new_tokens=8, return_dict_in_generate=True
        ).past_key_values
    assert torch.equal(answer(case.model, inputs, past_key_values=cache, **settings), expected)
    assert (kept[-1] == 0) is ("num_beams" in settings)


def test_a_dialogue_of_many_turns_keeps_using_one_cache(case, verdicts, kept):
    cache = DynamicCache(config=case.model.base.config.get_text_config())
    inputs = encode(case.processor, [QUESTION], [1])
    for level in ("none", "none", "low", "none", "high", "none"):
        verdicts(case.model, level)
        expected = case.model.generate(**inputs, max_new_tokens=8)
        actual = case.model.generate(**inputs, max_new_tokens=8, past_key_values=cache)
        assert torch.equal(actual, expected)
        inputs = next_turn(case, inputs, actual)
    assert kept[3] > 0 and kept[-1] > 0


def test_a_batch_continues_from_its_cache(case, verdicts):
    inputs = case.inputs(1, 2, 0)
    for levels in (("none", "none", "none"), ("none", "low", "none")):
        verdicts(case.model, *levels)
        output = case.model.generate(**inputs, max_new_tokens=4, return_dict_in_generate=True)
        following = next_turn(case, inputs, output.sequences)
        expected = answer(case.model, following)
        assert torch.equal(answer(case.model, following, past_key_values=output.past_key_values), expected)


@pytest.mark.parametrize("second", ["none", "low"])
def test_a_static_cache_is_emptied_where_it_does_not_fit(case, verdicts, kept, second):
    cache = StaticCache(config=case.model.base.config.get_text_config(), max_cache_len=256)
    verdicts(case.model, "none")
    inputs, output = first_turn(case, past_key_values=cache)
    inputs = next_turn(case, inputs, output.sequences)
    verdicts(case.model, second)
    expected = answer(case.model, inputs)
    assert torch.equal(answer(case.model, inputs, past_key_values=cache), expected)
    assert (kept[-1] > 0) is (second == "none")


def test_sliding_windows_continue_from_a_cache(verdicts):
    """Gemma 3 mixes sliding and full attention."""
    case = Case("gemma3")
    verdicts(case.model, "none")
    inputs, output = first_turn(case)
    assert any(output.past_key_values.is_sliding)
    following = {name: value for name, value in inputs.items() if name != "safety_question_mask"}
    more = case.processor.tokenizer("Is it?", return_tensors="pt")["input_ids"]
    length = output.sequences.shape[1] + more.shape[1]
    following["input_ids"] = torch.cat([output.sequences, more], dim=1)
    following["attention_mask"] = torch.ones(1, length, dtype=torch.long)
    zeros = inputs["token_type_ids"].new_zeros(1, length - inputs["token_type_ids"].shape[1])
    following["token_type_ids"] = torch.cat([inputs["token_type_ids"], zeros], dim=1)
    for level in ("none", "low"):
        verdicts(case.model, level)
        expected = answer(case.model, following)
        cache = first_turn(case)[1].past_key_values if level == "none" else output.past_key_values
        assert torch.equal(answer(case.model, following, past_key_values=cache), expected)


@pytest.mark.parametrize("policies", [("off", "off"), ("off", "default"), ("default", "off")])
def test_the_policy_may_change_between_turns(case, verdicts, policies):
    verdicts(case.model, "none")
    inputs, output = first_turn(case, policy=policies[0])
    inputs = next_turn(case, inputs, output.sequences, new_picture=True)
    expected = answer(case.model, inputs, safety_policy=policies[1])
    actual = answer(case.model, inputs, safety_policy=policies[1], past_key_values=output.past_key_values)
    assert torch.equal(actual, expected)


def test_a_cache_made_elsewhere_is_emptied(case, verdicts, kept):
    """Its contents are unknown."""
    verdicts(case.model, "none")
    prefix = case.processor.tokenizer("USER: hello there", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        cache = case.model.base(input_ids=prefix + 1, use_cache=True).past_key_values  # other tokens
    inputs = encode(case.processor, [QUESTION], [1])
    joined = {name: value for name, value in inputs.items() if name != "safety_question_mask"}
    for name, value in (("input_ids", prefix), ("attention_mask", prefix * 0 + 1), ("mm_token_type_ids", prefix * 0)):
        if name in joined:
            joined[name] = torch.cat([value, joined[name]], dim=1)
    for policy in (None, "off"):
        expected = answer(case.model, joined, safety_policy=policy)
        actual = answer(case.model, joined, safety_policy=policy, past_key_values=copy.deepcopy(cache))
        assert torch.equal(actual, expected) and kept[-1] == 0


def forward_more(case, cache, inputs):
    ids = inputs["input_ids"][:, :1].expand(cache.batch_size if hasattr(cache, "batch_size") else 1, 3)
    with torch.no_grad():
        case.model.base(input_ids=ids, past_key_values=cache)


def crop_and_forward(case, cache, inputs):
    cache.crop(-3)
    forward_more(case, cache, inputs)


CHANGES = {
    "forgotten": lambda case, cache, inputs: delattr(cache, "safevlm_prompt"),
    "cropped": lambda case, cache, inputs: cache.crop(-5),
    "cropped and refilled": crop_and_forward,
    "filled on": forward_more,
    "reordered": lambda case, cache, inputs: cache.reorder_cache(torch.tensor([0])),
    "selected": lambda case, cache, inputs: cache.batch_select_indices(torch.tensor([0])),
    "repeated": lambda case, cache, inputs: cache.batch_repeat_interleave(1),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_cache_changed_by_other_code_is_emptied(case, verdicts, kept, change):
    verdicts(case.model, "none")
    inputs, output = first_turn(case)
    inputs = next_turn(case, inputs, output.sequences, text="Is it? " * 9)
    expected = answer(case.model, inputs)
    CHANGES[change](case, output.past_key_values, inputs)
    assert torch.equal(answer(case.model, inputs, past_key_values=output.past_key_values), expected)
    assert kept[-1] == 0


def test_a_copy_of_a_cache_is_used(case, verdicts, kept):
    verdicts(case.model, "none")
    inputs, output = first_turn(case)
    inputs = next_turn(case, inputs, output.sequences)
    expected = answer(case.model, inputs)
    for _ in range(2):
        cache = copy.deepcopy(output.past_key_values)
        assert torch.equal(answer(case.model, inputs, past_key_values=cache), expected) and kept[-1] > 0


OTHER_CACHES = {
    "dynamic": lambda config: DynamicCache(config=config),
    "static": lambda config: StaticCache(config=config, max_cache_len=256),
}


@pytest.mark.parametrize("policy", [None, "off"])
@pytest.mark.parametrize("kind", OTHER_CACHES)
def test_another_picture_under_the_same_tokens_is_seen(case, kept, kind, policy):
    cache = OTHER_CACHES[kind](case.model.base.config.get_text_config())
    first, second = (encode(case.processor, [QUESTION], [1], seed=seed) for seed in (0, 1))
    assert torch.equal(first["input_ids"], second["input_ids"])
    for inputs in (first, second, first):
        expected = answer(case.model, inputs, safety_policy=policy)
        actual = answer(case.model, inputs, safety_policy=policy, past_key_values=cache)
        assert torch.equal(actual, expected)
        assert kept[-1] <= (inputs["input_ids"][0] == case.model.backbone.image_token_id).nonzero()[0]


def test_a_cache_is_cut_at_the_first_picture_that_differs(case, verdicts, kept):
    verdicts(case.model, "none")
    inputs = encode(case.processor, [QUESTION], [2])
    other = encode(case.processor, [QUESTION], [2])
    other["pixel_values"] = torch.cat([other["pixel_values"][: len(other["pixel_values"]) // 2]] * 2)
    output = case.model.generate(**inputs, max_new_tokens=8, return_dict_in_generate=True)
    expected = answer(case.model, other)
    assert torch.equal(answer(case.model, other, past_key_values=output.past_key_values), expected)
    images = (inputs["input_ids"][0] == case.model.backbone.image_token_id).nonzero().flatten()
    assert kept[-1] == images[len(images) // 2]


def test_a_verdict_about_one_picture_never_goes_with_an_answer_about_another(case):
    """A refused picture stays refused, whatever the cache was made with."""
    for seed in range(3):
        cache = DynamicCache(config=case.model.base.config.get_text_config())
        case.model.generate(**encode(case.processor, [QUESTION], [1]), max_new_tokens=4, past_key_values=cache)
        inputs = encode(case.processor, [QUESTION], [1], seed=seed + 5)
        output = case.model.generate(**inputs, max_new_tokens=4, past_key_values=cache, return_dict_in_generate=True)
        assert torch.equal(output.sequences, case.model.generate(**inputs, max_new_tokens=4))
        assert output.safety.to_list() == case.model.assess(**inputs).to_list()


def test_a_cache_left_behind_by_an_error_is_emptied(case, verdicts, kept):
    class Failing(LogitsProcessor):
        def __call__(self, input_ids, scores):
            if input_ids.shape[1] > self.length + 3:
                raise InterruptedError
            return scores

    verdicts(case.model, "none")
    inputs = encode(case.processor, [QUESTION], [1])
    expected, failing = answer(case.model, inputs), Failing()
    failing.length = inputs["input_ids"].shape[1]
    cache = DynamicCache(config=case.model.base.config.get_text_config())
    for _ in range(2):
        with pytest.raises(InterruptedError):
            answer(case.model, inputs, past_key_values=cache, logits_processor=LogitsProcessorList([failing]))
        assert torch.equal(answer(case.model, inputs, past_key_values=cache), expected) and kept[-1] == 0
        answer(case.model, inputs, past_key_values=cache)


def test_an_object_that_is_not_a_cache_is_refused(case):
    with pytest.raises(ValueError, match="must be a `Cache` such as"):
        case.model.generate(**case.inputs(1), past_key_values=((torch.zeros(1), torch.zeros(1)),))


def test_new_tokens_alone_are_refused(case, verdicts):
    """The safety head reads the whole conversation."""
    verdicts(case.model, "none")
    _, output = first_turn(case)
    more = case.processor.tokenizer("Is it?", return_tensors="pt")["input_ids"]
    del output.past_key_values.safevlm_prompt
    with pytest.raises(ValueError, match="pass the whole conversation's `input_ids` and images"):
        case.model.generate(input_ids=more, past_key_values=output.past_key_values)


def test_uncached_features_belong_to_the_tokens_after_the_cache():
    class Config:
        image_token_id = 9

    class Output(dict):
        def __init__(self, **fields):
            super().__init__(fields)

    ids = torch.tensor([[9, 9, 1, 9], [1, 9, 1, 9]])
    vectors = torch.arange(10.0).view(5, 2)
    for pooled in ([vectors[:2], vectors[2:3], vectors[3:4], vectors[4:]], list(vectors.split(1))):
        output = Output(pooler_output=pooled, deepstack_features=[[v + 100 for v in pooled]])
        actual = uncached_features({"image": output}, Config, ids, num_cached=1)["image"]
        assert [part.tolist() for part in actual["pooler_output"]] == [vectors[1:3].tolist(), vectors[3:].tolist()]
        assert torch.equal(torch.cat(actual["deepstack_features"][0]), vectors[1:] + 100)
    assert uncached_features({"image": output}, Config, ids, num_cached=4) == {}
    assert uncached_features({"image": output}, Config, ids, num_cached=0) == {"image": output}
    as_tensor = uncached_features({"image": Output(pooler_output=vectors[None])}, Config, ids[:1], num_cached=2)
    assert as_tensor["image"]["pooler_output"].tolist() == [[[4.0, 5.0]]]
