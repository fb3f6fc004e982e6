"""Saving and loading: shards, dtypes, tied weights, adapters; missing or foreign weights fail loudly."""

import copy
import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import SIZES, safe_model, tiny_llava
from transformers import AutoModel, AutoModelForImageTextToText

from safevlm import SafeVlmConfig, SafeVlmForConditionalGeneration


def assert_same_model(found, expected, inputs):
    assert found.state_dict().keys() == expected.state_dict().keys()
    assert all(torch.equal(value, expected.state_dict()[name]) for name, value in found.state_dict().items())
    with torch.no_grad():
        a, b = found.eval()(**inputs), expected(**inputs)
    torch.testing.assert_close(a.logits, b.logits, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(a.safety_level_logits, b.safety_level_logits, rtol=1e-4, atol=1e-4)
    assert torch.equal(found.generate(**inputs), expected.generate(**inputs))


@pytest.fixture(scope="module")
def saved(model_folders):
    return model_folders / "safe"


def edit_weights(folder, target, edit):
    """A copy of a saved model with other weights."""
    weights = load_file(folder / "model.safetensors")
    edit(weights)
    save_file(weights, target / "model.safetensors", metadata={"format": "pt"})
    (target / "config.json").write_text((folder / "config.json").read_text())
    return target


@pytest.mark.parametrize("auto", [AutoModel, AutoModelForImageTextToText, SafeVlmForConditionalGeneration])
def test_a_saved_model_loads_through_every_entrance(model, batch, saved, auto):
    found = auto.from_pretrained(saved)
    assert type(found) is SafeVlmForConditionalGeneration and not found.training
    assert_same_model(found, model, batch)


def test_a_sharded_save_reloads(model, batch, tmp_path):
    model.save_pretrained(tmp_path, max_shard_size="100KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 3
    assert_same_model(SafeVlmForConditionalGeneration.from_pretrained(tmp_path), model, batch)


def test_a_base_with_tied_weights_survives_saving(processor, batch, tmp_path):
    model = safe_model(tiny_llava(tie=True), processor)
    model.save_pretrained(tmp_path)
    names = load_file(tmp_path / "model.safetensors").keys()
    assert sum("embed_tokens" in name or "lm_head" in name for name in names) == 1
    found = SafeVlmForConditionalGeneration.from_pretrained(tmp_path)
    assert found.get_output_embeddings().weight is found.get_input_embeddings().weight
    assert_same_model(found, model, batch)


def test_a_grown_embedding_table_survives_saving(processor, batch, tmp_path):
    model = safe_model(tiny_llava(vocab_size=len(processor.tokenizer) - 1), processor)
    model.save_pretrained(tmp_path)
    assert_same_model(SafeVlmForConditionalGeneration.from_pretrained(tmp_path), model, batch)


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("loaded", [torch.float32, torch.bfloat16, "auto"])
def test_every_weight_has_the_dtype_asked_for(model, batch, tmp_path, stored, loaded):
    copy.deepcopy(model).to(stored).save_pretrained(tmp_path)
    found = SafeVlmForConditionalGeneration.from_pretrained(tmp_path, dtype=loaded)
    assert {p.dtype for p in found.parameters()} == {stored if loaded == "auto" else loaded}
    found.generate(**batch)


def test_a_second_save_over_a_loaded_model_is_the_same(saved, tmp_path):
    SafeVlmForConditionalGeneration.from_pretrained(saved).save_pretrained(tmp_path)
    first, second = (load_file(folder / "model.safetensors") for folder in (saved, tmp_path))
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("part", ["safety.", "safety.head.", "safety.embeddings.action.weight"])
def test_missing_safety_weights_fail_loudly(saved, tmp_path, part):
    def drop(weights):
        for name in [name for name in weights if name.startswith(part)]:
            del weights[name]

    with pytest.raises(
        ValueError, match="lacks .*[1-9][0-9]* of them safety weights.*safety modules are untrained.*from_base"
    ):
        SafeVlmForConditionalGeneration.from_pretrained(edit_weights(saved, tmp_path, drop))


def test_missing_base_weights_fail_loudly(saved, tmp_path):
    def drop(weights):
        del weights[next(name for name in weights if "layers.0.self_attn.q_proj" in name and "language" in name)]

    with pytest.raises(ValueError, match="lacks 1 weights.*q_proj"):
        SafeVlmForConditionalGeneration.from_pretrained(edit_weights(saved, tmp_path, drop))


@pytest.mark.parametrize("ignore", [False, True])
def test_weights_of_other_sizes_fail_loudly(saved, tmp_path, ignore):
    def shrink(weights):
        weights["safety.head.level_classifier.weight"] = torch.zeros(3, 32)

    edit_weights(saved, tmp_path, shrink)
    with pytest.raises((ValueError, RuntimeError), match="(?s)level_classifier|ignore_mismatched_sizes"):
        SafeVlmForConditionalGeneration.from_pretrained(tmp_path, ignore_mismatched_sizes=ignore)


def test_a_plain_base_checkpoint_is_not_taken_for_a_safe_one(base, tmp_path):
    config = SafeVlmConfig(base_config=base.config, **SIZES)
    base.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="lacks"):
        SafeVlmForConditionalGeneration.from_pretrained(tmp_path, config=config)


# -- adapters --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def adapter(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapter")
    model.save_safety_adapter(folder)
    return folder


def test_an_adapter_on_its_base_is_the_whole_model(model, batch, adapter):
    found = SafeVlmForConditionalGeneration.from_base(tiny_llava(), safety_adapter=adapter)
    assert_same_model(found, model, batch)
    assert found.config.to_dict()["safety_policy"] == model.config.to_dict()["safety_policy"]
    held = load_file(adapter / "safety_adapter.safetensors")
    assert held.keys() == model.safety.state_dict().keys()


def test_an_adapter_loads_onto_a_base_folder(model, batch, adapter, base, tmp_path):
    base.save_pretrained(tmp_path)
    found = SafeVlmForConditionalGeneration.from_base(tmp_path, safety_adapter=str(adapter))
    assert_same_model(found, model, batch)


def test_an_adapter_makes_room_for_the_placeholder_in_a_full_embedding_table(processor, batch, tmp_path):
    rows = len(processor.tokenizer) - 1
    safe_model(tiny_llava(vocab_size=rows), processor).save_safety_adapter(tmp_path)
    found = SafeVlmForConditionalGeneration.from_base(tiny_llava(vocab_size=rows), safety_adapter=tmp_path)
    assert found.generate(**batch).shape[0] == 3


def test_an_adapter_for_another_base_is_refused(adapter, model, tmp_path):
    for change, message in (
        (lambda c: setattr(c.vision_config, "hidden_size", 48), "vision width 32, this base has 48"),
        (lambda c: setattr(c.text_config, "hidden_size", 96), "language model width 64, this base has 96"),
        (lambda c: setattr(c, "image_token_id", 5), "image token id 3, this base has 5"),
    ):
        other = tiny_llava()
        change(other.config)
        with pytest.raises(ValueError, match=message):
            SafeVlmForConditionalGeneration.from_base(other, safety_adapter=adapter)
    with pytest.raises(
        ValueError, match="has no safety_adapter.safetensors or lora/adapter_model.safetensors; make one"
    ):
        SafeVlmForConditionalGeneration.from_base(tiny_llava(), safety_adapter=tmp_path)


def test_adapter_weights_that_do_not_fit_their_config_are_refused(adapter, tmp_path):
    weights = load_file(adapter / "safety_adapter.safetensors")
    del weights["head.level_classifier.weight"]
    save_file(weights, tmp_path / "safety_adapter.safetensors")
    (tmp_path / "config.json").write_text((adapter / "config.json").read_text())
    with pytest.raises(RuntimeError, match="head.level_classifier.weight"):
        SafeVlmForConditionalGeneration.from_base(tiny_llava(), safety_adapter=tmp_path)


# -- policy and configuration ----------------------------------------------------------------------------------------


def test_the_models_policy_is_saved_with_it(model, processor, batch, tmp_path):
    changed = copy.deepcopy(model)
    changed.set_safety_policy(
        {"name": "mine", "risk_threshold": 0.0, "hints": {"caution": "Mind {category}!"}}, processor
    )
    changed.save_pretrained(tmp_path)
    found = SafeVlmForConditionalGeneration.from_pretrained(tmp_path)
    assert found.resolve_policy() == changed.resolve_policy() and found.resolve_policy().name == "mine"
    assert torch.equal(found.generate(**batch), changed.generate(**batch))  # its texts have token ids, too


def test_a_preset_keeps_the_models_calibration(model):
    """Temperatures belong to the head, thresholds and actions to the preset; a policy in full keeps its own."""
    changed = copy.deepcopy(model)
    changed.set_safety_policy({"level_temperature": 0.5, "category_temperature": 2.0, "risk_threshold": 0.9})
    strict = changed.resolve_policy("strict")
    assert (strict.level_temperature, strict.category_temperature, strict.risk_threshold) == (0.5, 2.0, 0.2)
    assert changed.resolve_policy({"risk_threshold": 0.2}).level_temperature == 1.0
    assert changed.resolve_policy().risk_threshold == 0.9


def test_options_of_from_base_reach_the_config_checked(processor):
    config = SafeVlmConfig(num_head_tokens=3, **{k: v for k, v in SIZES.items() if k != "num_head_tokens"})
    model = SafeVlmForConditionalGeneration.from_base(
        tiny_llava(), processor, config=config, safety_projector_type="resampler", safety_policy="strict"
    )
    assert (model.config.num_head_tokens, model.config.safety_projector_type) == (3, "resampler")
    assert model.resolve_policy().name == "strict" and config.safety_projector_type is None
    assert json.loads(model.config.to_json_string())["safety_policy"]["risk_threshold"] == 0.2


def test_a_deep_copy_is_independent(model, batch):
    other = copy.deepcopy(model)
    torch.nn.init.zeros_(other.safety.embeddings.action.weight)
    before = model.generate(**batch)
    other.generate(**batch)
    assert torch.equal(model.generate(**batch), before)
