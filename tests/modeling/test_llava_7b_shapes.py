"""LLaVA-1.5-7B at its real shapes: on the meta device, name by name, and at full width with one layer each."""

import gc
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import chat, picture, tiny_llava, tiny_processor
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
)

from safevlm import SafeVlmConfig, SafeVlmForConditionalGeneration, SafeVlmProcessor

VISION, TEXT, VOCABULARY = 1024, 4096, 32064


def llava_7b_config(vision_layers=24, text_layers=32, image_size=336, image_token_id=32000) -> LlavaConfig:
    """The configuration of llava-hf/llava-1.5-7b-hf."""
    return LlavaConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=VISION,
            intermediate_size=4096,
            num_hidden_layers=vision_layers,
            num_attention_heads=16,
            image_size=image_size,
            patch_size=14,
            projection_dim=768,
        ),
        text_config=LlamaConfig(
            hidden_size=TEXT,
            intermediate_size=11008,
            num_hidden_layers=text_layers,
            num_attention_heads=32,
            num_key_value_heads=32,
            vocab_size=VOCABULARY,
            max_position_embeddings=4096,
            rms_norm_eps=1e-5,
        ),
        image_token_index=image_token_id,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        tie_word_embeddings=False,
        pad_token_id=0 if image_token_id == 3 else 32001,
    )


def hub_shapes(vision_layers=24, text_layers=32) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the weights in llava-hf/llava-1.5-7b-hf, written down by rule."""
    shapes = {
        "language_model.model.embed_tokens.weight": (VOCABULARY, TEXT),
        "language_model.model.norm.weight": (TEXT,),
        "language_model.lm_head.weight": (VOCABULARY, TEXT),
        "multi_modal_projector.linear_1.weight": (TEXT, VISION),
        "multi_modal_projector.linear_1.bias": (TEXT,),
        "multi_modal_projector.linear_2.weight": (TEXT, TEXT),
        "multi_modal_projector.linear_2.bias": (TEXT,),
        "vision_tower.vision_model.embeddings.class_embedding": (VISION,),
        "vision_tower.vision_model.embeddings.patch_embedding.weight": (VISION, 3, 14, 14),
        "vision_tower.vision_model.embeddings.position_embedding.weight": (24 * 24 + 1, VISION),
    }
    for norm in ("pre_layrnorm", "post_layernorm"):
        shapes |= {f"vision_tower.vision_model.{norm}.{part}": (VISION,) for part in ("weight", "bias")}
    for i in range(vision_layers):
        layer = f"vision_tower.vision_model.encoder.layers.{i}"
        widths = {f"self_attn.{name}_proj": (VISION, VISION) for name in ("q", "k", "v", "out")}
        widths |= {"mlp.fc1": (4096, VISION), "mlp.fc2": (VISION, 4096)}
        shapes |= {f"{layer}.{name}.weight": shape for name, shape in widths.items()}
        shapes |= {f"{layer}.{name}.bias": shape[:1] for name, shape in widths.items()}
        shapes |= {f"{layer}.layer_norm{n}.{part}": (VISION,) for n in (1, 2) for part in ("weight", "bias")}
    for i in range(text_layers):
        layer = f"language_model.model.layers.{i}"
        shapes |= {f"{layer}.self_attn.{name}_proj.weight": (TEXT, TEXT) for name in "qkvo"}
        shapes |= {f"{layer}.mlp.{name}_proj.weight": (11008, TEXT) for name in ("gate", "up")}
        shapes |= {f"{layer}.mlp.down_proj.weight": (TEXT, 11008)}
        shapes |= {f"{layer}.{name}_layernorm.weight": (TEXT,) for name in ("input", "post_attention")}
    return shapes


def wrapped_name(name: str) -> str:
    """Where a weight of the Hub's file is in the wrapped model."""
    for old, new in (
        ("language_model.model.", "model.language_model."),
        ("language_model.lm_head.", "lm_head."),
        ("multi_modal_projector.", "model.multi_modal_projector."),
        ("vision_tower.vision_model.", "model.vision_tower."),
    ):
        if name.startswith(old):
            return "base." + new + name.removeprefix(old)
    raise AssertionError(name)


def on_meta(config: SafeVlmConfig) -> SafeVlmForConditionalGeneration:
    with torch.device("meta"):
        return SafeVlmForConditionalGeneration(config)


@pytest.fixture(scope="module")
def meta_model():
    return on_meta(SafeVlmConfig(base_config=llava_7b_config()))


def test_the_hubs_weights_map_one_to_one_into_the_wrapped_model(meta_model):
    expected = {wrapped_name(name): shape for name, shape in hub_shapes().items()}
    assert len(expected) == len(hub_shapes()) == 686
    found = {name: tuple(value.shape) for name, value in meta_model.state_dict().items()}
    assert {name: shape for name, shape in found.items() if not name.startswith("safety.")} == expected
    assert sum(value.numel() for value in meta_model.base.parameters()) == 7_063_427_072


def test_a_checkpoint_with_the_hubs_names_loads_completely(processor, tmp_path):
    """The same names at tiny size, through the real loader."""
    base = tiny_llava()
    names = {}
    for name in base.state_dict():
        old = name.replace("model.language_model.", "language_model.model.").replace(
            "lm_head.", "language_model.lm_head."
        )
        old = old.replace("model.vision_tower.", "vision_tower.vision_model.").replace("model.multi", "multi")
        assert wrapped_name(old) == "base." + name
        names[old] = name
    save_file({old: base.state_dict()[name].clone() for old, name in names.items()}, tmp_path / "model.safetensors")
    base.config.save_pretrained(tmp_path)
    base.generation_config.save_pretrained(tmp_path)
    model = SafeVlmForConditionalGeneration.from_base(
        tmp_path, processor, safety_hidden_size=32, num_safety_features=4
    )
    loaded = model.base.state_dict()
    assert all(torch.equal(value, loaded[name]) for name, value in base.state_dict().items())


def linear(inputs, outputs):
    return inputs * outputs + outputs


def safety_parameters(hidden, depth, head_tokens, prompt_tokens, projected_tokens, categories=7, levels=4):
    """Number of safety parameters by hand: projector, head, embeddings."""
    width = hidden // 2
    block = 2 * hidden + linear(hidden, width) + width * 16 * 9 + width  # norm, 1x1, 3x3 in groups of 16 channels
    block += linear(width, width // 4) + linear(width // 4, width) + linear(width, hidden)
    projector = 2 * VISION + linear(VISION, hidden) + 2 * depth * block + 2 * linear(hidden, hidden) + 2 * hidden
    attention = 2 * hidden + 4 * linear(hidden, hidden)
    attention += 2 * hidden + linear(hidden, 2 * hidden) + linear(2 * hidden, hidden)
    head = (head_tokens + 1) * hidden + 2 * TEXT + linear(TEXT, hidden) + attention + 2 * hidden
    head += linear(hidden, 1) + linear(hidden, levels) + linear(hidden, categories)
    embeddings = prompt_tokens * TEXT + projected_tokens * hidden + attention + 2 * hidden + linear(hidden, TEXT)
    embeddings += (4 + categories) * TEXT
    return projector, head, embeddings


@pytest.mark.parametrize(
    ("config", "sizes", "literals"),
    [
        (SafeVlmConfig, (1024, 2, 16, 4, 4), (8_185_344, 12_635_148, 12_665_856)),
        (SafeVlmConfig.paper, (4096, 3, 64, 64, 16), (152_900_608, 151_375_884, 151_425_024)),
    ],
    ids=["default", "paper"],
)
def test_safety_modules_have_the_sizes_written_down(config, sizes, literals):
    safety = on_meta(config(base_config=llava_7b_config(1, 1))).safety
    found = tuple(
        sum(parameter.numel() for parameter in part.parameters())
        for part in (safety.projector, safety.head, safety.embeddings)
    )
    assert found == safety_parameters(*sizes) == literals


def test_meta_initialisation_allocates_nothing(meta_model):
    assert {tensor.device.type for tensor in (*meta_model.parameters(), *meta_model.buffers())} == {"meta"}


# -- loading over devices --------------------------------------------------------------------------------------------


def test_a_base_partly_on_disk_answers_like_one_in_memory(processor, batch, tmp_path):
    base = tiny_llava()
    base.save_pretrained(tmp_path / "base", max_shard_size="50KB")
    device_map = {
        "model.vision_tower": "cpu",
        "model.multi_modal_projector": "cpu",
        "model.language_model.embed_tokens": "cpu",
        "model.language_model.layers.0": "disk",
        "model.language_model.layers.1": "cpu",
        "model.language_model.norm": "cpu",
        "model.language_model.rotary_emb": "cpu",
        "lm_head": "cpu",
    }
    torch.manual_seed(0)
    offloaded = SafeVlmForConditionalGeneration.from_base(
        tmp_path / "base",
        processor,
        base_kwargs=dict(device_map=device_map, offload_folder=tmp_path / "offload"),
        safety_hidden_size=32,
        num_safety_features=4,
    )
    assert {p.device.type for p in offloaded.base.model.language_model.layers[0].parameters()} == {"meta"}
    torch.manual_seed(0)
    plain = SafeVlmForConditionalGeneration.from_base(base, processor, safety_hidden_size=32, num_safety_features=4)
    plain.safety.load_state_dict(offloaded.safety.state_dict())
    assert torch.equal(offloaded.generate(**batch), plain.eval().generate(**batch))


def test_a_saved_model_partly_on_disk_answers_like_one_in_memory(model, batch, tmp_path):
    model.save_pretrained(tmp_path / "saved")
    parts = ["safety", "base.lm_head", "base.model.vision_tower", "base.model.multi_modal_projector"]
    parts += [f"base.model.language_model.{part}" for part in ("embed_tokens", "norm", "rotary_emb", "layers.0")]
    device_map = {**dict.fromkeys(parts, "cpu"), "base.model.language_model.layers.1": "disk"}
    found = SafeVlmForConditionalGeneration.from_pretrained(
        tmp_path / "saved", device_map=device_map, offload_folder=tmp_path / "offload"
    )
    assert torch.equal(found.generate(**batch), model.generate(**batch))


def test_device_map_auto_leaves_nothing_on_meta(model, batch, tmp_path):
    model.save_pretrained(tmp_path)
    found = SafeVlmForConditionalGeneration.from_pretrained(tmp_path, device_map="auto", dtype="auto")
    assert "meta" not in {tensor.device.type for tensor in (*found.parameters(), *found.buffers())}
    assert torch.equal(
        found.generate(**{name: value.to(found.device) for name, value in batch.items()}).cpu(),
        model.generate(**batch),
    )


@pytest.mark.slow
def test_full_width_sharded_bfloat16_checkpoint_trains_saves_and_reloads(tmp_path):
    """7B widths, one layer each, 4 image tokens: 0.9 GB."""
    config = llava_7b_config(vision_layers=2, text_layers=1, image_size=28, image_token_id=3)
    with torch.device("meta"):
        base = LlavaForConditionalGeneration(config).to(torch.bfloat16)
    base = base.to_empty(device="cpu")
    pattern = torch.randn(2**20, dtype=torch.bfloat16) * 0.02
    with torch.no_grad():
        for parameter in base.parameters():
            parameter.copy_(
                pattern.repeat(-(-parameter.numel() // len(pattern)))[: parameter.numel()].view_as(parameter)
            )
    base.config.dtype = torch.bfloat16
    base.save_pretrained(tmp_path / "base", max_shard_size="300MB")
    assert len(json.loads((tmp_path / "base/model.safetensors.index.json").read_text())["weight_map"]) > 40
    del base
    gc.collect()

    processor = SafeVlmProcessor.from_base(tiny_processor(image_size=28, patch_size=14))
    model = SafeVlmForConditionalGeneration.from_base(
        tmp_path / "base", processor, base_kwargs=dict(dtype=torch.bfloat16, device_map={"": "cpu"})
    )
    assert {(p.dtype, p.device.type) for p in model.parameters()} == {(torch.bfloat16, "cpu")}
    assert "meta" not in {buffer.device.type for buffer in model.buffers()}
    assert model.get_input_embeddings().weight.shape[0] == VOCABULARY  # the placeholder has a spare row

    model.train()
    model.gradient_checkpointing_enable()
    for parameter in model.base.parameters():
        parameter.requires_grad_(False)
    model.enable_input_require_grads()
    prompt = processor.apply_chat_template(chat("hi"), add_generation_prompt=True)
    inputs = processor(images=[picture()], text=prompt, return_tensors="pt")
    labels = torch.tensor([3])
    model.float()  # a backward pass in bfloat16 takes a minute on a CPU
    output = model(**inputs, labels=inputs["input_ids"], safety_level_labels=labels, safety_category_labels=labels)
    output.loss.backward()
    assert output.loss.isfinite() and output.lm_loss > 0
    untrained = [name for name, p in model.safety.named_parameters() if p.grad is None or not p.grad.isfinite().all()]
    assert not [name for name in untrained if "no_question" not in name]
    assert model.safety.embeddings.output[1].weight.grad.abs().sum() > 0  # through the language model
    model.zero_grad()
    model.bfloat16()
    model.save_pretrained(tmp_path / "safe", max_shard_size="300MB")
    expected = {name: value.clone() for name, value in model.safety.state_dict().items()}
    del model, output
    gc.collect()

    found = SafeVlmForConditionalGeneration.from_pretrained(tmp_path / "safe", dtype="auto", device_map="auto")
    assert {(p.dtype, p.device.type == "meta") for p in found.parameters()} == {(torch.bfloat16, False)}
    assert all(torch.equal(value.cpu(), expected[name]) for name, value in found.safety.state_dict().items())
    stored = {}
    for shard in Path(tmp_path / "base").glob("*.safetensors"):
        stored |= load_file(shard)
    norm = found.base.model.language_model.norm.weight
    assert torch.equal(norm.cpu(), stored["language_model.model.norm.weight"])
    assert found.assess(**inputs.to(found.device)).score.isfinite().all()
