"""Bad input gets an error that names the argument, its value and the fix."""

import copy

import pytest
import torch
from tiny import SIZES, encode, safe_model, tiny_llava, tiny_tokenizer
from transformers import LlamaConfig, LlamaForCausalLM

from safevlm import SafeVlmConfig, SafeVlmForConditionalGeneration, SafeVlmProcessor

from_base = SafeVlmForConditionalGeneration.from_base


@pytest.fixture(scope="module")
def one(processor):
    return encode(processor, ["hello"], [1])


@pytest.fixture(scope="module")
def tiny_llama():
    config = LlamaConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, vocab_size=64
    )
    return LlamaForCausalLM(config)


# -- building --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("as_folder", [True, False])
def test_a_base_that_is_not_a_vision_language_model_is_refused(tiny_llama, tmp_path, as_folder):
    base = tiny_llama
    if as_folder:
        tiny_llama.save_pretrained(tmp_path)
        tiny_tokenizer().save_pretrained(tmp_path)
        base = str(tmp_path)
    with pytest.raises(ValueError, match="type 'llama'; SafeVLM supports .*llava.*without vision cannot be a base"):
        from_base(base)
    with pytest.raises(ValueError, match="type 'llama'"):
        SafeVlmForConditionalGeneration(SafeVlmConfig(base_config=tiny_llama.config))


@pytest.mark.parametrize("base", [None, 3, torch.nn.Linear(1, 1)])
def test_a_base_of_a_wrong_type_is_refused(base):
    with pytest.raises(TypeError, match=f"`base` must be a Hub id, a folder or a loaded model.*{type(base).__name__}"):
        from_base(base)


def test_a_missing_base_folder_is_named(tmp_path):
    with pytest.raises(OSError, match="no_such_model"):
        from_base(tmp_path / "no_such_model")


def test_a_config_without_a_base_is_refused():
    with pytest.raises(ValueError, match="base"):
        SafeVlmForConditionalGeneration(SafeVlmConfig())


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (dict(num_promt_tokens=3), TypeError, "unknown option 'num_promt_tokens'; known: .*num_prompt_tokens"),
        (dict(num_prompt_tokens=-1), ValueError, "`num_prompt_tokens` must be 0 or more, got -1"),
        (dict(safety_projector_type="mlp"), ValueError, "'c_abstractor' or 'resampler', got 'mlp'"),
        (dict(num_safety_features=10), ValueError, "must be a square .* got 10"),
        (dict(safe_category="harmless"), ValueError, "`safe_category` 'harmless' is not among .*politics"),
        (dict(level_names=["none"], safety_policy={"level_actions": {}}), ValueError, "at least two entries"),
        (dict(safety_hidden_size=30), ValueError, r"`num_attention_heads` \(4\) must divide .* \(30\)"),
        (dict(safety_policy="lenient"), ValueError, "presets default, paper, strict, off; got 'lenient'"),
        (
            dict(level_names=["ok", "bad"], safety_policy={"level_actions": {"none": "allow", "high": "warn"}}),
            ValueError,
            "`level_actions` names 'none'.*It has: ok, bad",
        ),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)
@pytest.mark.parametrize("with_config", [False, True])
def test_wrong_options_are_refused(processor, options, error, message, with_config):
    with pytest.raises(error, match=message):
        if with_config:
            from_base(tiny_llava(), processor, config=SafeVlmConfig(**SIZES), **options)
        else:
            from_base(tiny_llava(), processor, **{**SIZES, **options})


def test_a_patch_grid_that_is_not_square_is_refused(model):
    with pytest.raises(ValueError, match="same square patch grid .* got 15 patches.*'resampler'"):
        model.safety.projector(torch.zeros(1, 15, 32))


# -- inputs ----------------------------------------------------------------------------------------------------------


CALLS = pytest.mark.parametrize("call", ["generate", "assess", "forward"])


@CALLS
@pytest.mark.parametrize("tokens_per_image", [0, 3, 9])
def test_a_processor_that_does_not_match_is_refused(model, base_processor, call, tokens_per_image):
    other = SafeVlmProcessor.from_base(base_processor, tokens_per_image=tokens_per_image)
    message = (
        rf"\[{tokens_per_image}, {2 * tokens_per_image}\] `<safety>` placeholders per row.*"
        "the model expects 8 after the tokens of each image"
    )
    with pytest.raises(ValueError, match=message):
        getattr(model, call)(**encode(other, ["a", "b"], [1, 2]))


@CALLS
def test_the_bases_own_processor_is_refused(model, base_processor, call):
    with pytest.raises(
        ValueError, match="The processor does not match the model: use the SafeVlmProcessor saved with"
    ):
        getattr(model, call)(**encode(base_processor, ["a"], [1]))


@CALLS
@pytest.mark.parametrize("name", ["pixel_values_videos", "video_grid_thw", "input_features"])
def test_media_that_the_head_does_not_see_are_refused(model, one, call, name):
    with pytest.raises(ValueError, match=f"`{name}` cannot be passed: .* images only"):
        getattr(model, call)(**one, **{name: torch.zeros(1)})


@CALLS
def test_missing_images_are_refused(model, one, call):
    with pytest.raises(ValueError, match="has 16 image tokens, but `pixel_values` is missing"):
        getattr(model, call)(input_ids=one["input_ids"], attention_mask=one["attention_mask"])


@CALLS
@pytest.mark.parametrize(("rows", "tokens"), [(0, 3), (2, 0)])
def test_an_empty_batch_is_refused(model, call, rows, tokens):
    with pytest.raises(ValueError, match=rf"`input_ids` of shape \({rows}, {tokens}\) holds no prompt"):
        getattr(model, call)(input_ids=torch.ones(rows, tokens, dtype=torch.long))


@CALLS
@pytest.mark.parametrize(
    ("change", "got"),
    [
        (lambda pixels: pixels[None], r"shape \(1, 1, 3, 32, 32\)"),
        (lambda pixels: pixels[0], r"shape \(3, 32, 32\)"),
        (lambda pixels: pixels[:0], r"shape \(0, 3, 32, 32\)"),
        (list, "a list"),
        (torch.Tensor.numpy, "a ndarray"),
    ],
    ids=["5-D", "3-D", "none", "list", "numpy"],
)
@pytest.mark.parametrize("policy", ["default", "off"])
def test_pixel_values_of_another_form_are_refused(model, one, call, change, got, policy):
    policy = {} if call == "forward" else dict(safety_policy=policy)
    with pytest.raises(ValueError, match=rf"`pixel_values` must be a tensor with 4 dimensions .*, got {got}"):
        getattr(model, call)(**{**one, "pixel_values": change(one["pixel_values"])}, **policy)


@CALLS
def test_a_wrong_number_of_images_is_refused(model, one, call):
    pixels = one["pixel_values"]
    with pytest.raises(ValueError, match="2 images were passed, but `input_ids` has image tokens for 1"):
        getattr(model, call)(**{**one, "pixel_values": torch.cat([pixels, pixels])})
    two = {name: torch.cat([one[name], one[name]]) for name in ("input_ids", "attention_mask")}
    with pytest.raises(ValueError, match="Row 1 of `input_ids` has 16 image tokens, but its images take 0"):
        getattr(model, call)(**two, pixel_values=pixels)


@pytest.mark.parametrize(
    ("ids", "got"),
    [
        (None, "got None"),
        ([[1, 2]], r"got \[\[1, 2\]\]"),
        ("hello", "got 'hello'"),
        (torch.tensor([1, 2]), r"shape \(2,\)"),
        (torch.zeros(1, 4, 8), r"shape \(1, 4, 8\)"),
        (torch.zeros(1, 4), "float"),
    ],
)
@CALLS
def test_input_ids_of_a_wrong_type_are_refused(model, one, ids, got, call):
    with pytest.raises(ValueError, match=f"`input_ids` must be a tensor of token ids.*{got}"):
        getattr(model, call)(input_ids=ids, pixel_values=one["pixel_values"])


@pytest.mark.parametrize("mask", [torch.ones(1, 3), torch.ones(2, 30)])
def test_an_attention_mask_of_another_shape_is_refused(model, one, mask):
    with pytest.raises(ValueError, match="`attention_mask` must have the shape of `input_ids`"):
        model.generate(**{**one, "attention_mask": mask})


@pytest.mark.parametrize("policy", ["default", "off"])
def test_embeddings_instead_of_ids_are_refused(model, one, policy):
    embeds = model.get_input_embeddings()(one["input_ids"])
    with pytest.raises(ValueError, match="`inputs_embeds` cannot be passed.*Pass `input_ids`"):
        model.generate(inputs_embeds=embeds, safety_policy=policy)
    with pytest.raises(ValueError, match="`inputs_embeds`"):
        model(inputs_embeds=embeds)


def test_paged_generation_is_refused(model, one):
    with pytest.raises(ValueError, match="`cache_implementation='paged'` bypasses the safety head. Use 'dynamic'"):
        model.generate(**one, cache_implementation="paged")
    with pytest.raises(NotImplementedError, match="ignores images and would bypass the safety head.*`generate`"):
        model.generate_batch([one["input_ids"][0].tolist()])


def test_features_from_elsewhere_are_refused(model, one):
    with pytest.raises(ValueError, match="`mm_encoder_outputs` cannot be passed.*Pass `pixel_values`"):
        model.generate(**one, mm_encoder_outputs={"image": object()})


@pytest.mark.parametrize("name", ["mm_encoder_outputs", "inputs_embeds"])
def test_forward_refuses_what_would_bypass_the_head(model, one, name):
    with pytest.raises(ValueError, match=f"`{name}`"):
        model(**one, **{name: torch.zeros(1)})


def test_a_misspelt_argument_is_refused(model, one):
    with pytest.raises(ValueError, match="safety_polcy"):
        model.generate(**one, safety_polcy="off")


@pytest.mark.parametrize("policy", ["lenient", 3, {"risk_threshold": 2}])
def test_a_wrong_policy_is_refused_before_anything_runs(model, one, policy, monkeypatch):
    monkeypatch.setattr(model, "encode_images", None)
    for call in (model.generate, model.assess):
        with pytest.raises(ValueError):
            call(**one, safety_policy=policy)


def test_a_call_after_an_error_works_as_before(model, one):
    expected = model.generate(**one)
    with pytest.raises(ValueError):
        model.generate(**one, max_new_tokens=-1)
    assert torch.equal(model.generate(**one), expected)


def test_a_resampler_takes_any_grid(processor, batch):
    model = safe_model(tiny_llava(), processor, safety_projector_type="resampler", num_safety_features=5)
    assert model.assess(**batch).level_probabilities[:2].isfinite().all()
    other = copy.deepcopy(model.safety.projector)
    assert other(torch.randn(2, 15, 32)).shape == (2, 5, 32)


def test_padded_patches_do_not_reach_the_resampler(processor):
    model = safe_model(tiny_llava(), processor, safety_projector_type="resampler", num_safety_features=5)
    patches = torch.randn(1, 7, 32)
    padded = torch.cat([patches, torch.randn(1, 4, 32)], dim=1)
    mask = torch.arange(11).unsqueeze(0) < 7
    torch.testing.assert_close(model.safety.projector(padded, mask), model.safety.projector(patches))
