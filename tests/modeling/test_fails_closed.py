"""Without a reliable verdict, or if other code would write the answer: the strictest action or a clear error."""

import copy
import json
import shutil
import threading

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from tiny import answers, chat, encode, new_tokens, picture, safe_model, tiny_llava
from transformers import GenerationConfig, GenerationMixin, LogitsProcessor, LogitsProcessorList

import safevlm.embedding_override as embedding_override
from safevlm import SafetyPolicy, SafeVlmForConditionalGeneration
from safevlm.loading_checks import check_safety_weights
from safevlm.policy_enforcement import EnforcePolicy

REFUSAL = "I can't help with this request: it involves politics."
from_pretrained = SafeVlmForConditionalGeneration.from_pretrained
from_base = SafeVlmForConditionalGeneration.from_base


@pytest.fixture(scope="module")
def one(processor):
    return encode(processor, ["hello"], [1])


@pytest.fixture(scope="module")
def folder(model_folders):
    return model_folders / "safe"


def refused(model, processor, inputs, **settings):
    output = model.generate(**inputs, max_new_tokens=80, **settings)
    return [text.strip().startswith("I can't help with this request") for text in answers(processor, output, inputs)]


# -- numbers that are not finite -------------------------------------------------------------------------------------


def broken_head(model):
    model.safety.head.level_classifier.weight[0, 0] = float("inf")


def overflowing_projector(model):
    model.safety.projector.input.weight[:] = 3e38


def nan_in_a_query(model):
    model.safety.head.layers[0].query.weight[0, 0] = float("nan")


def nan_in_a_key(model):
    model.safety.head.layers[0].key.bias[0] = float("nan")


def nan_in_the_heads_norm(model):
    model.safety.head.layers[0].norm.weight[0] = float("nan")


def nan_in_a_safety_token(model):
    model.safety.head.tokens.weight[0] = float("nan")


DAMAGES = [
    broken_head,
    overflowing_projector,
    nan_in_a_safety_token,
    nan_in_a_query,
    nan_in_a_key,
    nan_in_the_heads_norm,
]


@pytest.mark.parametrize("policy", ["default", "paper", "strict"])
@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_weights_refuse_every_row_with_an_image(model, processor, batch, damage, policy):
    broken = copy.deepcopy(model)
    with torch.no_grad():
        damage(broken)
    verdict = broken.assess(**batch, safety_policy=policy)
    assert verdict.actions == ["refuse", "refuse", "allow"] and verdict.failed.tolist() == [True, True, False]
    json.dumps(verdict.to_list(), allow_nan=False)
    assert refused(broken, processor, batch, safety_policy=policy) == [True, True, False]


@pytest.mark.parametrize("saved", ["by this release", "by an earlier one", "no texts"])
def test_the_refusal_of_a_failed_head_names_no_category(model, processor, one, saved):
    broken = copy.deepcopy(model)
    with torch.no_grad():
        broken_head(broken)
    neutral = REFUSAL.replace("politics", "a possible safety risk")
    settings, expected = {}, neutral
    if saved == "by an earlier one":  # which lacks that text: a category's, as it wrote then
        del broken.config.policy_token_ids[neutral]
        expected = REFUSAL.replace("politics", broken.config.category_names[broken.assess(**one).category])
    elif saved == "no texts":
        broken.config.policy_token_ids.clear()
        settings = dict(tokenizer=processor.tokenizer)
    output = broken.generate(**one, max_new_tokens=80, **settings)
    assert [text.strip() for text in answers(processor, output, one)] == [expected]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_pixel_that_is_not_finite_refuses_only_its_row(model, processor, batch, value):
    clean = model.assess(**batch)
    for image, row in ((0, 0), (1, 1), (2, 1)):
        pixels = batch["pixel_values"].clone()
        pixels[image, 0, 3, 3] = value
        verdict = model.assess(**{**batch, "pixel_values": pixels})
        assert verdict.failed.tolist() == [i == row for i in range(3)] and verdict.actions[row] == "refuse"
        other = 1 - row
        torch.testing.assert_close(verdict.score[other], clean.score[other])
        actual = refused(model, processor, {**batch, "pixel_values": pixels}, do_sample=True)
        assert actual[row] and actual[other] == (clean.actions[other] == "refuse")


def test_one_reading_that_fails_is_enough(model, processor, verdicts, one, monkeypatch):
    verdicts(model, "none")
    predict, seen = model.predict_safety, []

    def second_is_none(*args, **kwargs):
        prediction = predict(*args, **kwargs)
        seen.append(prediction)
        if len(seen) % 2 == 0:
            prediction.level_logits = prediction.level_logits * float("nan")
        return prediction

    monkeypatch.setattr(model, "predict_safety", second_is_none)
    begun = torch.tensor([[100]])  # the beginning of an answer adds a reading
    longer = {**one, "input_ids": torch.cat([one["input_ids"], begun], dim=1)}
    for name, value in (("attention_mask", 1), ("safety_question_mask", 0)):
        longer[name] = torch.cat([one[name], begun * 0 + value], dim=1)
    actual = model.assess(**longer)
    assert len(seen) > 1 and actual.actions == ["refuse"]


def test_a_half_precision_head_that_overflows_refuses(model, processor, one):
    half = copy.deepcopy(model).half()
    with torch.no_grad():
        half.safety.head.text_input.weight *= 6e4
    assert half.assess(**{k: v.half() if v.is_floating_point() else v for k, v in one.items()}).actions == ["refuse"]


# -- weights that are damaged ----------------------------------------------------------------------------------------


def damage_file(path, name, value):
    weights = load_file(path)
    (key,) = (key for key in weights if key.endswith(name))
    weights[key] = (
        torch.full_like(weights[key], value) if value == 0 else weights[key].index_fill(0, torch.tensor([0]), value)
    )
    save_file(weights, path, metadata={"format": "pt"})


@pytest.mark.parametrize("placed", [{}, {"device_map": {"base": "cpu", "safety": "disk"}}])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), 0.0])
def test_damaged_safety_weights_are_refused_at_load(model, tmp_path, value, placed):
    model.save_pretrained(tmp_path)
    damage_file(tmp_path / "model.safetensors", "safety.head.level_classifier.weight", value)
    if placed:
        placed = {**placed, "offload_folder": tmp_path / "offload"}
    with pytest.raises(ValueError, match="safety weights of .* are damaged: head.level_classifier.weight is"):
        from_pretrained(tmp_path, **placed)
    with pytest.raises(ValueError, match="damaged: head.level_classifier.weight is"):
        from_pretrained(tmp_path, output_loading_info=True, **placed)


@pytest.mark.parametrize("value", [float("nan"), 0.0])
def test_a_damaged_adapter_is_refused(model, processor, tmp_path, value):
    model.save_safety_adapter(tmp_path)
    damage_file(tmp_path / "safety_adapter.safetensors", "projector.input.weight", value)
    with pytest.raises(ValueError, match="damaged: projector.input.weight is"):
        from_base(tiny_llava(), processor, safety_adapter=tmp_path)


def test_weights_that_half_precision_cannot_hold_are_refused(model, tmp_path):
    big = copy.deepcopy(model)
    with torch.no_grad():
        big.safety.head.level_classifier.weight[0, 0] = 1e6
    big.save_pretrained(tmp_path)
    from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="not finite.*another `dtype`"):
        from_pretrained(tmp_path, dtype=torch.float16)


def test_zero_biases_and_weights_on_the_meta_device_pass(model):
    fresh = copy.deepcopy(model.safety)
    for name, weight in fresh.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.zeros_(weight)
    check_safety_weights(fresh, "x")
    check_safety_weights(fresh.to("meta"), "x")


@pytest.fixture(scope="module")
def lora_adapter(model, processor, tmp_path_factory):
    from peft import LoraConfig, get_peft_model

    path = tmp_path_factory.mktemp("lora")
    lora = LoraConfig(target_modules=r"base.model.language_model.*q_proj", modules_to_save=["safety"], r=2)
    get_peft_model(copy.deepcopy(model), lora).save_pretrained(path / "lora")
    model.config.save_pretrained(path)
    return path


@pytest.mark.parametrize(
    ("drop", "message"),
    [
        (".safety.head.level_classifier.weight", "lacks 1 weights, 1 of them safety weights"),
        ("safety.", "lacks .* of them safety weights"),
        ("layers.0.self_attn.q_proj.lora_A.weight", "lacks 1 weights, 0 of them safety"),
    ],
)
def test_an_adapter_that_lacks_weights_is_refused(lora_adapter, processor, tmp_path, drop, message):
    import shutil

    folder = shutil.copytree(lora_adapter, tmp_path / "adapter")
    from_base(tiny_llava(), processor, safety_adapter=folder)
    path = folder / "lora" / "adapter_model.safetensors"
    weights = load_file(path)
    kept = {name: weight for name, weight in weights.items() if drop not in name}
    assert len(kept) < len(weights)
    save_file(kept, path, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=message):
        from_base(tiny_llava(), processor, safety_adapter=folder)


@pytest.mark.parametrize("part", ["safety.head.level_classifier.weight", "lora_B.weight"])
def test_a_lora_adapter_that_is_not_finite_is_refused(lora_adapter, processor, tmp_path, part):
    import shutil

    folder = shutil.copytree(lora_adapter, tmp_path / "adapter")
    path = folder / "lora" / "adapter_model.safetensors"
    weights = load_file(path)
    weights[next(name for name in weights if name.endswith(part))][0, 0] = float("nan")
    save_file(weights, path, metadata={"format": "pt"})
    with pytest.raises(ValueError, match="is damaged: .* not finite"):
        from_base(tiny_llava(), processor, safety_adapter=folder)


@pytest.mark.parametrize("form", ["model", "injected", "folder"])
def test_a_base_with_a_peft_adapter_is_refused(processor, base_processor, tmp_path, form):
    from peft import LoraConfig, get_peft_model

    base = tiny_llava()
    lora = LoraConfig(target_modules=r".*language_model.*q_proj", r=2)
    if form == "injected":
        base.add_adapter(lora)
    elif form == "model":
        base = get_peft_model(base, lora)
    else:
        base.save_pretrained(tmp_path / "base")
        base_processor.save_pretrained(tmp_path / "lora")
        adapted = get_peft_model(base, lora)
        adapted.peft_config["default"].base_model_name_or_path = str(tmp_path / "base")
        adapted.save_pretrained(tmp_path / "lora")
        base = tmp_path / "lora"
    with pytest.raises(ValueError, match="carries a PEFT adapter.*Merge it first"):
        from_base(base, processor)


# -- the forced refusal is the whole answer --------------------------------------------------------------------------


@pytest.mark.parametrize("ends", [-1, [-1], [2, -1], 10**6, torch.tensor([-1, 2])])
@pytest.mark.parametrize("how", ["argument", "config", "the model's config"])
def test_an_end_token_outside_the_vocabulary_is_refused(model, processor, one, verdicts, monkeypatch, ends, how):
    verdicts(model, "high")
    options = {"eos_token_id": ends} if how == "argument" else {}
    if how == "config":
        options = {"generation_config": GenerationConfig(eos_token_id=ends, max_new_tokens=70)}
    elif how == "the model's config":
        monkeypatch.setattr(model.generation_config, "eos_token_id", ends)
    with pytest.raises(ValueError, match="(`eos_token_id`|special token) (-1|1000000)"):
        model.generate(**one, **options)


def test_an_end_token_in_the_middle_of_the_refusal_cuts_it(model, processor, batch, verdicts):
    verdicts(model, "high", "none", "none")
    script = [int(i) for i in model.config.policy_token_ids[REFUSAL].split()]
    tokens = new_tokens(model.generate(**batch, eos_token_id=script[4], max_new_tokens=80), batch)[0].tolist()
    end = script.index(script[4]) + 1
    assert tokens[:end] == script[:end] and not any(tokens[end:])


def appending(model, input_ids, logits_processor=None, stopping_criteria=None, generation_config=None, **kwargs):
    """A decoding method that writes the refusal and then other text."""
    ids = input_ids
    for _ in range(75):
        scores = logits_processor(ids, torch.zeros(len(ids), 448))
        ids = torch.cat([ids, scores[:, :384].argmax(-1, keepdim=True)], dim=1)
        if ids[0, -1] == 2:
            break
    return torch.cat([ids, torch.full((len(ids), 5), 100)], dim=1)


def test_text_after_the_refusal_is_caught(model, one, verdicts):
    verdicts(model, "high")
    with pytest.raises(RuntimeError, match="wrote something other than the forced refusal"):
        model.generate(**one, custom_generate=appending)


class Listener:
    def __init__(self):
        self.heard = []

    def put(self, value):
        self.heard += value.flatten().tolist()

    def end(self):
        pass


def test_a_streamer_never_gets_anything_but_the_refusal(model, one, verdicts):
    """Whatever the base streams."""
    verdicts(model, "high")
    other = copy.deepcopy(model)
    other.predict_safety = model.predict_safety

    def generate(streamer, input_ids, **kwargs):
        streamer.put(input_ids)
        streamer.put(torch.tensor([100]))

    other.base.generate = generate
    listener = Listener()
    with pytest.raises(RuntimeError, match="forced refusal"):
        other.generate(**one, streamer=listener)
    assert listener.heard == one["input_ids"][0].tolist()


def test_an_assistant_with_fewer_tokens_drafts(processor, base_processor, verdicts):
    """A base that had no spare row for `<safety>` has more tokens than its small sibling."""
    length = len(base_processor.tokenizer)
    model = safe_model(tiny_llava(vocab_size=length), processor)
    inputs = encode(processor, ["hello"], [1])
    tokenizers = dict(tokenizer=processor.tokenizer, assistant_tokenizer=base_processor.tokenizer)
    for level in ("high", "none"):
        verdicts(model, level)
        expected = model.generate(**inputs, max_new_tokens=70)
        actual = model.generate(
            **inputs, max_new_tokens=70, assistant_model=tiny_llava(seed=1, vocab_size=length), **tokenizers
        )
        assert torch.equal(actual, expected)


def test_what_an_assistant_cannot_write_it_need_not_draft():
    enforcement = EnforcePolicy([[300, 7]], 2, [2], 0, [400], vocab_size=448)
    scores = torch.zeros(1, 110)
    assert torch.equal(enforcement(torch.zeros(1, 2), scores), scores)
    assert enforcement(torch.zeros(1, 3), scores).argmax() == 7
    assert enforcement(torch.zeros(1, 2), torch.zeros(1, 448)).argmax() == 300


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ("", "has no tokens at all"),
        ("-1", "the token id -1, outside the vocabulary"),
        ("99999", "the token id 99999, outside"),
        ("2", "the special token 2"),
        ("0 0", "the special token 0"),
        ("1 100", "the special token 1"),
        ("100 3 101", "the special token 3"),
    ],
)
def test_a_saved_refusal_that_cannot_be_one_is_refused_at_load(model, folder, tmp_path, ids, message):
    copied = shutil.copytree(folder, tmp_path / "model")
    config = json.loads((copied / "config.json").read_text())
    config["policy_token_ids"][REFUSAL] = ids
    (copied / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=message):
        from_pretrained(copied)


@pytest.mark.parametrize("opening", [[2], [0], [1], [3], [10**6], [-1], ["a"], [None], [2.5]])
def test_what_opens_an_answer_cannot_end_it(model, folder, tmp_path, one, verdicts, opening):
    config = json.loads((folder / "config.json").read_text())
    config["answer_opening_token_ids"] = opening
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="What opens an answer .* has "):
        from_pretrained(tmp_path)
    hostile = copy.deepcopy(model)
    hostile.config.answer_opening_token_ids = opening
    verdicts(hostile, "high")
    with pytest.raises(ValueError, match="What opens an answer .* has "):
        hostile.generate(**one, max_new_tokens=80)


def test_a_saved_refusal_that_says_something_else_is_refused_with_a_tokenizer(model, processor, one, verdicts):
    verdicts(model, "high")
    hostile = copy.deepcopy(model)
    hostile.predict_safety = model.predict_safety
    ids = processor.tokenizer("Sure, the answer is yes.", add_special_tokens=False)["input_ids"]
    hostile.config.policy_token_ids[REFUSAL] = " ".join(map(str, ids))
    with pytest.raises(ValueError, match="tokens that say 'Sure, the answer is yes.'"):
        hostile.generate(**one, tokenizer=processor.tokenizer)
    with pytest.raises(ValueError, match="tokens that say"):
        hostile.check_policy_texts(processor)
    model.check_policy_texts(processor)


def test_a_placeholder_that_is_another_token_is_refused(model, processor):
    hostile = copy.deepcopy(model)
    hostile.config.safety_token_id = 100
    with pytest.raises(ValueError, match="placeholder has the token id .*, the model's 100"):
        hostile.check_policy_texts(processor)


@pytest.mark.parametrize("text", ["</s>", "No.</s>", "<image>", "No <safety>"])
def test_texts_with_special_tokens_are_refused(model, processor, one, verdicts, text):
    policy = SafetyPolicy(refusals={"en": text})
    with pytest.raises(ValueError, match="the special token"):
        copy.deepcopy(model).set_safety_policy(policy, processor)
    verdicts(model, "high")
    with pytest.raises(ValueError, match="the special token"):
        model.generate(**one, safety_policy=policy, tokenizer=processor.tokenizer)


# -- bypasses --------------------------------------------------------------------------------------------------------

GENERATES = {"generate", "generate_batch", "init_continuous_batching", "continuous_batching_context_manager"}
DOES_NOT = {
    "adjust_generation_fn",
    "compute_transition_scores",
    "destroy_cached_continuous_batching_manager",
    "heal_tokens",  # calls our `generate`
    "load_custom_generate",
    "output_modalities",
    "prepare_inputs_for_generation",
}


def test_every_public_method_that_generates_is_known_and_ours(model, one):
    public = {name for cls in GenerationMixin.__mro__ for name in vars(cls) if not name.startswith("_")}
    assert public <= GENERATES | DOES_NOT
    for name in GENERATES:
        assert getattr(type(model), name) is not getattr(GenerationMixin, name, None)
    for name in GENERATES & public - {"generate"}:
        with pytest.raises(NotImplementedError, match="bypass the safety head"):
            getattr(model, name)([one["input_ids"][0].tolist()])


def test_a_custom_generate_folder_does_not_replace_generate(folder, tmp_path):
    import shutil

    copied = shutil.copytree(folder, tmp_path / "model")
    (copied / "custom_generate").mkdir()
    (copied / "custom_generate" / "generate.py").write_text("def generate(model, **kwargs):\n    return 1\n")
    with pytest.raises(ValueError, match="custom_generate/ folder"):
        from_pretrained(copied, trust_remote_code=True)


def test_inputs_twice_are_refused(model, one):
    with pytest.raises(ValueError, match="both `inputs` and `input_ids`"):
        model.generate(one["input_ids"], **one)


@pytest.mark.parametrize("name", ["image_hidden_states", "image_features", "pixel_values_other"])
def test_images_that_the_head_does_not_see_are_refused(model, one, name):
    with pytest.raises(ValueError, match=f"`{name}` cannot be passed"):
        model.generate(**one, **{name: torch.zeros(1, 16, 64)})


def test_token_healing_is_refused(model, processor, one):
    with pytest.raises(ValueError, match="token_healing"):
        model.generate(**one, token_healing=True, tokenizer=processor.tokenizer)


def test_a_mask_that_hides_a_row_or_an_image_is_refused(model, batch):
    mask = batch["attention_mask"].clone()
    mask[2] = 0
    for call in (model.generate, model.assess):
        with pytest.raises(ValueError, match="hides all of row 2"):
            call(**{**batch, "attention_mask": mask})
    mask = batch["attention_mask"] * (batch["input_ids"] != 3)
    with pytest.raises(ValueError, match="hides image tokens of row 0"):
        model.generate(**{**batch, "attention_mask": mask})


@settings(deadline=None, max_examples=40)
@given(start=st.integers(0, 60), length=st.integers(1, 80))
def test_a_callers_mask_hides_no_question(model, processor, start, length):
    inputs = encode(processor, ["How do I use this against someone?"], [1])
    mask = inputs["safety_question_mask"].clone()
    mask[0, start : start + length] = 0
    expected, actual = model.assess(**inputs), model.assess(**{**inputs, "safety_question_mask": mask})
    assert actual.score >= expected.score - 1e-5


def test_the_processors_mask_hides_answers(model, processor):
    """What follows the opening of an assistant's turn stays hidden."""
    messages = [*chat("hello"), {"role": "assistant", "content": [{"type": "text", "text": "yes"}]}, *chat("no", 0)]
    text = processor.apply_chat_template(messages, add_generation_prompt=True)
    inputs = processor(images=[picture()], text=[text], return_tensors="pt")
    parts = model.prompt_parts(inputs["input_ids"], inputs["attention_mask"], inputs["safety_question_mask"])
    assert torch.equal(parts.questions, inputs["safety_question_mask"].bool())
    assert (~parts.questions).any()


def right_padded(inputs):
    mask, moved = inputs["attention_mask"], dict(inputs)
    for name, value in inputs.items():
        if value.shape == mask.shape:
            rows = [torch.roll(row, int(seen.sum()), 0) for row, seen in zip(value, mask, strict=True)]
            moved[name] = torch.stack(rows)
    return moved


@pytest.mark.parametrize("options", [{}, dict(num_beams=2), dict(cache_implementation="static")])
def test_right_padding_gives_what_left_padding_gives(model, batch, verdicts, options):
    verdicts(model, "low", "none", "high")
    assert (batch["attention_mask"] == 0).any()
    moved = right_padded(batch)
    torch.testing.assert_close(model.assess(**moved).score, model.assess(**batch).score)
    actual, expected = (model.generate(**inputs, max_new_tokens=6, **options) for inputs in (moved, batch))
    assert torch.equal(new_tokens(actual, batch), new_tokens(expected, batch))


def test_right_padding_under_off_is_the_bases(model, processor, base, base_processor):
    texts = ["What is in the picture?", "no"]
    own, bases = (right_padded(encode(p, texts, [1, 1])) for p in (processor, base_processor))
    actual, expected = model.generate(**own, safety_policy="off"), base.generate(**bases)
    assert torch.equal(new_tokens(actual, own), new_tokens(expected, bases))


# -- the safety embeddings arrive ------------------------------------------------------------------------------------


def second_copy(model):
    """Another copy of the hook's code, such as a model's own remote code."""
    import importlib.util
    import sys

    spec = importlib.util.spec_from_file_location("safevlm.embedding_override_copy", embedding_override.__file__)
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_two_copies_of_the_code_on_one_base_do_not_hide_each_other(model, one, verdicts, monkeypatch):
    import safevlm.generation_safevlm as generation

    verdicts(model, "low")
    wrapper = copy.deepcopy(model)
    wrapper.predict_safety = model.predict_safety
    expected = wrapper.generate(**one)
    monkeypatch.setattr(generation, "override_embeddings", second_copy(wrapper).override_embeddings)
    assert torch.equal(wrapper.generate(**one), expected)
    plain = copy.deepcopy(wrapper)
    plain.predict_safety = model.predict_safety
    torch.nn.init.zeros_(plain.safety.embeddings.tokens.weight)
    assert not torch.equal(plain.generate(**one), expected)  # so the embeddings arrive, and matter


@pytest.mark.parametrize("call", ["generate", "forward"])
def test_embeddings_that_do_not_arrive_are_an_error(model, one, monkeypatch, call):
    lost = copy.deepcopy(model)
    lost.generate(**one)
    monkeypatch.setattr(embedding_override, "_install_hooks", lambda base: None)
    lost.base.get_input_embeddings()._forward_hooks.clear()
    with pytest.raises(RuntimeError, match="8 of 8 safety embeddings did not reach"):
        getattr(lost, call)(**one)


def test_a_picture_after_a_cache_gets_its_embeddings_in_forward(model, processor, one):
    """A hand-written decoding loop, in which `forward` gets only the new tokens."""
    text = processor.tokenizer("USER: hello ", return_tensors="pt", add_special_tokens=False)["input_ids"]
    with torch.no_grad():
        cache = model(input_ids=text, use_cache=True).past_key_values
        ones = torch.ones(1, text.shape[1] + one["input_ids"].shape[1], dtype=torch.long)
        question = one["safety_question_mask"]
        actual = model(**{**one, "attention_mask": ones}, past_key_values=cache).logits
        joined = {**one, "input_ids": torch.cat([text, one["input_ids"]], 1), "attention_mask": ones}
        joined["safety_question_mask"] = torch.cat([torch.zeros_like(text), question], 1)
        expected = model(**joined).logits
    torch.testing.assert_close(actual[0, -1], expected[0, -1], atol=1e-4, rtol=1e-4)


class Asking(LogitsProcessor):
    """Makes another call of the model, or its base, before each token."""

    def __init__(self, ask):
        self.ask, self.answers = ask, []

    def __call__(self, input_ids, scores):
        self.answers.append(self.ask())
        return scores


@pytest.mark.parametrize("policy", ["default", "off"])
def test_generate_works_inside_a_logits_processor(model, processor, batch, one, verdicts, policy):
    text = processor.tokenizer(["USER: yes ASSISTANT:"], return_tensors="pt")
    inner = [
        lambda: model.generate(**one, safety_policy=policy, max_new_tokens=3),
        lambda: model.generate(input_ids=text["input_ids"], safety_policy=policy, max_new_tokens=3),
        lambda: model.base.generate(input_ids=text["input_ids"], max_new_tokens=3),
    ]
    for ask in inner:
        expected, alone = model.generate(**batch, max_new_tokens=4), ask()
        asking = Asking(ask)
        actual = model.generate(**batch, max_new_tokens=4, logits_processor=LogitsProcessorList([asking]))
        assert torch.equal(actual, expected)
        assert all(torch.equal(answer, alone) for answer in asking.answers)


def test_threads_do_not_mix_under_the_check(model, batch, one):
    expected, failures = model.generate(**batch), []

    def work():
        for _ in range(3):
            if not torch.equal(model.generate(**batch), expected):
                failures.append(1)

    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    for _ in range(3):
        model.generate(**one)
    for thread in threads:
        thread.join()
    assert not failures


def test_a_dynamically_quantised_model_keeps_its_verdicts(model, batch):
    from torch.ao.quantization import quantize_dynamic

    small = quantize_dynamic(copy.deepcopy(model), {torch.nn.Linear})
    torch.testing.assert_close(small.assess(**batch).score, model.assess(**batch).score, atol=0.05, rtol=0)
    assert small.generate(**batch, max_new_tokens=3).shape == model.generate(**batch, max_new_tokens=3).shape


# -- what a model says about itself ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("policy", "says"),
    [
        ("off", "it is off"),
        ("default", None),
        ({"risk_threshold": 0.7}, "of every category is 0.7, above 0.5"),
        ({"category_risk_thresholds": {"safe": 0.7}}, None),  # no request is assessed by it
    ],
)
def test_loading_warns_of_a_weak_policy(model, processor, tmp_path, caplog, policy, says):
    from transformers.utils import logging

    saved = copy.deepcopy(model)
    saved.set_safety_policy(policy)
    saved.save_pretrained(tmp_path)
    logger = logging.get_logger("safevlm.modeling_safevlm")
    logger.addHandler(caplog.handler)
    try:
        loaded = from_pretrained(tmp_path)
    finally:
        logger.removeHandler(caplog.handler)
    assert bool(loaded.policy_weaknesses()) is bool(says)
    assert (says is not None and says in caplog.text) or "is weak" not in caplog.text


def test_a_hostile_temperature_is_refused_at_load(folder, tmp_path):
    import shutil

    copied = shutil.copytree(folder, tmp_path / "model")
    config = json.loads((copied / "config.json").read_text())
    config["safety_policy"]["level_temperature"] = 1e9
    (copied / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"`level_temperature` must be a number in \[0.1, 10\]"):
        from_pretrained(copied)


def test_from_base_takes_a_policy_file(processor, tmp_path):
    SafetyPolicy(name="mine", risk_threshold=0.25).to_file(tmp_path / "mine.yaml")
    model = safe_model(tiny_llava(), processor, safety_policy=str(tmp_path / "mine.yaml"))
    assert model.resolve_policy().name == "mine" and isinstance(model.config.safety_policy, dict)
