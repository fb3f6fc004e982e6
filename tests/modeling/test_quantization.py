"""8-bit and 4-bit bases (bitsandbytes, on the CPU): the safety modules and the output layer are never quantised."""

import copy
import json

import bitsandbytes as bnb
import pytest
import torch
from cpus import CPUS, pretend_cpu
from tiny import SIZES, encode, new_tokens, safe_model, tiny_llava
from transformers import AutoModelForImageTextToText, BitsAndBytesConfig, GPTQConfig

from safevlm import SafeVlmForConditionalGeneration
from safevlm.quantization import keep_safety_modules

QUANTIZED = (bnb.nn.Linear8bitLt, bnb.nn.Linear4bit)
CONFIGS = {
    "8 bit": lambda **more: BitsAndBytesConfig(load_in_8bit=True, **more),
    "4 bit": lambda **more: BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", **more),
}
# Layers of widths that bitsandbytes by itself, without this package, crashes on where it packs weights.
NARROW = ["model.vision_tower", "model.multi_modal_projector"]
# What rounding the tiny base's weights does to the probability of risk.
TOLERANCE = {"8 bit": 0.01, "4 bit": 0.1}


# On the other kind of CPU 8 bit is the same; tests of something else take the CPU as it is.
@pytest.fixture(params=["8 bit", *(f"4 bit {cpu}" for cpu in CPUS)])
def bits(request, monkeypatch):
    bits, cpu = request.param[:5], request.param[6:]
    if cpu:
        pretend_cpu(monkeypatch, cpu)
    return bits


def packed_layers(model) -> set[str]:
    return {
        name
        for name, module in model.named_modules()
        if isinstance(module, bnb.nn.Linear4bit)
        and getattr(module.weight.quant_state, "packing_format_for_cpu", False)
    }


def quantized_layers(model) -> set[str]:
    return {name for name, module in model.named_modules() if isinstance(module, QUANTIZED)}


def assert_right_layers(model):
    layers = quantized_layers(model)
    assert any("language_model" in name for name in layers) and any("vision_tower" in name for name in layers)
    assert not any(name.startswith("safety") or name.endswith("lm_head") for name in layers)
    assert all(parameter.dtype == torch.float32 for parameter in model.safety.parameters())


def assert_same(found, expected, batch):
    assert quantized_layers(found) == quantized_layers(expected)
    with torch.no_grad():
        a, b = found(**batch), expected(**batch)
    torch.testing.assert_close(a.logits, b.logits)
    torch.testing.assert_close(a.safety_level_logits, b.safety_level_logits)
    assert torch.equal(found.generate(**batch), expected.generate(**batch))


def test_a_safe_model_loads_quantised_without_naming_its_safety_modules(model, batch, model_folders, bits, tmp_path):
    found = SafeVlmForConditionalGeneration.from_pretrained(
        model_folders / "safe", quantization_config=CONFIGS[bits]()
    )
    assert_right_layers(found)
    difference = (found.assess(**batch).score - model.assess(**batch).score).abs().max()
    assert 0 < difference < TOLERANCE[bits]
    found.save_pretrained(tmp_path / "saved")
    again = SafeVlmForConditionalGeneration.from_pretrained(tmp_path / "saved")
    assert again.is_quantized
    assert_same(again, found, batch)


def test_fresh_safety_modules_go_onto_a_quantised_base(batch, model_folders, bits, tmp_path):
    found = SafeVlmForConditionalGeneration.from_base(
        model_folders / "base", base_kwargs={"quantization_config": CONFIGS[bits]()}, **SIZES
    )
    assert_right_layers(found)
    found.save_pretrained(tmp_path)
    assert_same(SafeVlmForConditionalGeneration.from_pretrained(tmp_path), found, batch)


def test_an_adapter_moves_between_quantised_and_plain_bases(model, batch, model_folders, bits, tmp_path):
    found = SafeVlmForConditionalGeneration.from_base(
        model_folders / "base",
        safety_adapter=model_folders / "adapter",
        base_kwargs={"quantization_config": CONFIGS[bits]()},
    )
    direct = SafeVlmForConditionalGeneration.from_pretrained(
        model_folders / "safe", quantization_config=CONFIGS[bits]()
    )
    assert_same(found, direct, batch)
    found.save_safety_adapter(tmp_path)
    plain = SafeVlmForConditionalGeneration.from_base(model_folders / "base", safety_adapter=tmp_path)
    assert not quantized_layers(plain) and getattr(plain.config, "quantization_config", None) is None
    assert torch.equal(plain.assess(**batch).score, model.assess(**batch).score)


@pytest.mark.parametrize("name", ["model.vision_tower", "base.model.vision_tower"])
def test_the_users_own_list_is_kept(model_folders, name):
    config = CONFIGS["8 bit"](llm_int8_skip_modules=[name])
    found = SafeVlmForConditionalGeneration.from_pretrained(model_folders / "safe", quantization_config=config)
    layers = quantized_layers(found)
    assert layers and all("language_model" in layer or "multi_modal_projector" in layer for layer in layers)
    assert config.llm_int8_skip_modules == [name]  # the caller's config is not changed


def test_the_users_own_list_for_a_base_does_not_drop_the_output_layer(batch, model_folders, tmp_path):
    config = CONFIGS["4 bit"](llm_int8_skip_modules=["model.vision_tower"])
    found = SafeVlmForConditionalGeneration.from_base(
        model_folders / "base", base_kwargs={"quantization_config": config}, **SIZES
    )
    assert not any("vision_tower" in name or "lm_head" in name for name in quantized_layers(found))
    found.save_pretrained(tmp_path)
    assert_same(SafeVlmForConditionalGeneration.from_pretrained(tmp_path), found, batch)


def test_a_quantisation_config_may_be_a_dict(model_folders):
    found = SafeVlmForConditionalGeneration.from_pretrained(
        model_folders / "safe", quantization_config={"load_in_8bit": True}
    )
    assert_right_layers(found)


def test_a_quantisation_that_cannot_leave_modules_out_is_refused():
    with pytest.raises(ValueError, match="GPTQConfig cannot leave modules out.*must not be quantised"):
        keep_safety_modules(GPTQConfig(bits=4))


def test_the_base_of_a_quantised_model_is_saved_by_itself(model_folders, base_processor, bits, tmp_path):
    config = CONFIGS[bits](llm_int8_skip_modules=NARROW)
    found = SafeVlmForConditionalGeneration.from_pretrained(model_folders / "safe", quantization_config=config)
    found.base.save_pretrained(tmp_path)
    assert "safety" not in json.dumps(json.loads((tmp_path / "config.json").read_text())["quantization_config"])
    base = AutoModelForImageTextToText.from_pretrained(tmp_path)
    inputs = encode(base_processor, ["Is it yes?"], images=[1])
    assert quantized_layers(base) == {name.removeprefix("base.") for name in quantized_layers(found)}
    torch.testing.assert_close(base(**inputs).logits, found.base(**inputs).logits)


def test_policy_off_is_the_quantised_base_bit_for_bit(model_folders, processor, base_processor, bits):
    config = CONFIGS[bits](llm_int8_skip_modules=NARROW)
    base = AutoModelForImageTextToText.from_pretrained(model_folders / "base", quantization_config=config)
    found = safe_model(copy.deepcopy(base), processor)
    with_tokens, without = (encode(p, ["Is it yes?"], images=[1]) for p in (processor, base_processor))
    safe = found.generate(**with_tokens, safety_policy="off")
    assert torch.equal(new_tokens(safe, with_tokens), new_tokens(base.generate(**without), without))


def test_dequantising_leaves_no_trace_of_quantisation(batch, model_folders, bits, tmp_path):
    found = SafeVlmForConditionalGeneration.from_pretrained(
        model_folders / "safe", quantization_config=CONFIGS[bits]()
    )
    before = found.assess(**batch).score
    found.dequantize()
    assert not quantized_layers(found)
    found.save_pretrained(tmp_path / "whole")
    found.base.save_pretrained(tmp_path / "base")
    for name in ("whole", "base"):
        assert "quantization_config" not in (tmp_path / name / "config.json").read_text()
    again = SafeVlmForConditionalGeneration.from_pretrained(tmp_path / "whole")
    torch.testing.assert_close(again.assess(**batch).score, before, rtol=0, atol=0.01)


def test_a_plain_model_is_not_marked_as_quantised(processor):
    assert not getattr(safe_model(tiny_llava(), processor), "is_quantized", False)


@pytest.fixture
def packing(model_folders, monkeypatch):
    """In 4 bit, on a CPU with AVX512-BF16."""
    pretend_cpu(monkeypatch, "with AVX512-BF16")
    return SafeVlmForConditionalGeneration.from_pretrained(
        model_folders / "safe", quantization_config=CONFIGS["4 bit"]()
    )


def test_layers_that_cannot_be_packed_compute_as_on_other_cpus(packing, model_folders, batch, monkeypatch):
    pretend_cpu(monkeypatch, "without AVX512-BF16")
    config = CONFIGS["4 bit"]()
    other = SafeVlmForConditionalGeneration.from_pretrained(model_folders / "safe", quantization_config=config)
    with torch.no_grad():
        found, expected = packing(**batch), other(**batch)
    torch.testing.assert_close(found.safety_level_logits, expected.safety_level_logits, rtol=0, atol=0.05)
    packed = packed_layers(packing)
    assert not packed_layers(other)
    narrow = {name for name in quantized_layers(packing) if packing.get_submodule(name).in_features == 32}
    assert packed and narrow and not packed & narrow  # a block is 64 wide


def test_a_packed_model_passes_gradients_once_it_is_trained(packing, batch):
    with torch.no_grad():
        packing(**batch)
    assert packed_layers(packing)
    packing.train()
    embeddings = packing.get_input_embeddings()
    packing(**batch).logits.sum().backward()
    through_the_layers = embeddings.weight.grad
    assert not packed_layers(packing) and through_the_layers.abs().max() > 0
    packing.eval()
    with torch.no_grad():
        packing(**batch)
    assert not packed_layers(packing)  # it would round the weights once more at each evaluation


def test_a_packed_model_dequantises_to_its_weights(packing, batch):
    name = "base.model.language_model.layers.0.mlp.up_proj"
    layer = packing.get_submodule(name)
    expected = bnb.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
    with torch.no_grad():
        packing(**batch)
    assert name in packed_layers(packing)
    packing.dequantize()
    torch.testing.assert_close(packing.get_submodule(name).weight, expected, rtol=0.01, atol=0)
