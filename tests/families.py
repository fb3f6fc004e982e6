"""Tiny random models of every supported family, with their real processor classes and templates of the real shape.

`build(family)` returns a base model and its processor, offline and in milliseconds. The sizes are small but the
layouts are real: tiles, native resolution, pan-and-scan, boundary tokens, M-RoPE, prefix attention.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers as hf
from tiny import CHAT_TEMPLATE, TOKEN_IDS, VISION, tiny_tokenizer
from tiny import TEXT as TINY_TEXT

from safevlm.processing.processing_safevlm import base_processor_class

TEXT = dict(**TINY_TEXT, **TOKEN_IDS, vocab_size=448, max_position_embeddings=2048)

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% for p in m['content'] %}{% if p['type'] == 'image' %}IMAGE{% else %}{{ p['text'] }}{% endif %}{% endfor %}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
IDEFICS = (
    "<|im_start|>{% for m in messages %}{{ m['role'] | capitalize }}:"
    "{% for p in m['content'] %}{% if p['type'] == 'image' %}<image>{% else %} {{ p['text'] }}{% endif %}"
    "{% endfor %}<end_of_utterance>\n{% endfor %}{% if add_generation_prompt %}Assistant:{% endif %}"
)
GEMMA = (
    "<s>{% for m in messages %}<start_of_turn>{{ 'model' if m['role'] == 'assistant' else m['role'] }}\n"
    "{% for p in m['content'] %}{% if p['type'] == 'image' %}<start_of_image>{% else %}{{ p['text'] | trim }}"
    "{% endif %}{% endfor %}<end_of_turn>\n{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
MISTRAL = (
    "<s>{% for m in messages %}{% if m['role'] == 'assistant' %}{% for p in m['content'] %} {{ p['text'] }}"
    "{% endfor %}</s>{% else %}[INST] {% for p in m['content'] %}{% if p['type'] == 'image' %}<image>\n"
    "{% else %}{{ p['text'] }}{% endif %}{% endfor %} [/INST]{% endif %}{% endfor %}"
)


@dataclass
class Family:
    """
    Args:
        tokens (`dict[str, str]`): Named tokens, with the names that the family's own tokenizer uses.
        more_tokens (`tuple[str]`): Other special tokens.
        processor_class (`str`): A class of transformers.
        image_processor (`Callable`): Makes the image processor.
        settings (`dict`): The processor's other arguments.
        chat_template (`str`, *optional*): Has the shape of the published one.
        make_config (`Callable`): Makes the model's configuration, given a function from tokens to ids.
    """

    tokens: dict[str, str]
    more_tokens: tuple[str, ...]
    processor_class: str
    image_processor: Callable
    settings: dict
    chat_template: str | None
    make_config: Callable


def _llava(ids):
    return hf.LlavaConfig(
        vision_config=hf.CLIPVisionConfig(**VISION, image_size=32),
        text_config=hf.LlamaConfig(**TEXT),
        image_token_index=ids("<image>"),
    )


def _llava_next(ids):
    return hf.LlavaNextConfig(
        vision_config=hf.CLIPVisionConfig(**VISION, image_size=32),
        text_config=hf.MistralConfig(**TEXT),
        image_token_index=ids("<image>"),
        image_grid_pinpoints=[[32, 64], [64, 32], [64, 64]],
    )


def _llava_onevision(ids):
    return hf.LlavaOnevisionConfig(
        vision_config=hf.SiglipVisionConfig(**VISION, image_size=32, vision_use_head=False),
        text_config=hf.Qwen2Config(**TEXT),
        image_token_index=ids("<image>"),
        video_token_index=ids("<video>"),
        image_grid_pinpoints=[[32, 32], [32, 64], [64, 32], [64, 64]],
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
    )


def _qwen(config_class, text=(), **vision):
    def make(ids):
        rope = {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 10000.0}
        return config_class(
            vision_config=dict(intermediate_size=64, num_heads=4, patch_size=8, temporal_patch_size=2, **vision),
            text_config=dict(**TEXT, rope_parameters=rope, head_dim=16, **dict(text)),
            image_token_id=ids("<|image_pad|>"),
            video_token_id=ids("<|video_pad|>"),
            vision_start_token_id=ids("<|vision_start|>"),
            vision_end_token_id=ids("<|vision_end|>"),
        )

    return make


def _gemma3(ids):
    return hf.Gemma3Config(
        vision_config=hf.SiglipVisionConfig(**VISION, image_size=32, vision_use_head=False),
        text_config=hf.Gemma3TextConfig(
            **{**TEXT, "head_dim": 16, "sliding_window": 32, "query_pre_attn_scalar": 16},
            layer_types=["sliding_attention", "full_attention"],
        ),
        mm_tokens_per_image=4,
        boi_token_index=ids("<start_of_image>"),
        eoi_token_index=ids("<end_of_image>"),
        image_token_index=ids("<image_soft_token>"),
    )


def _paligemma(ids):
    return hf.PaliGemmaConfig(
        vision_config=hf.SiglipVisionConfig(**VISION, image_size=32, vision_use_head=False, projection_dim=64),
        text_config=hf.GemmaConfig(**TEXT | {"vocab_size": 1664}, head_dim=16),  # with <loc...> and <seg...>
        image_token_index=ids("<image>"),
        projection_dim=64,
    )


def _idefics(config_class, vision_class):
    def make(ids):
        return config_class(
            vision_config=vision_class(**VISION, image_size=32),
            text_config=hf.LlamaConfig(**TEXT),
            image_token_id=ids("<image>"),
            scale_factor=2,
            pad_token_id=0,
        )

    return make


def _internvl(ids):
    return hf.InternVLConfig(
        vision_config=hf.InternVLVisionConfig(**VISION | {"patch_size": [8, 8]}, image_size=[32, 32]),
        text_config=hf.Qwen2Config(**TEXT),
        image_token_id=ids("<IMG_CONTEXT>"),
        image_seq_length=4,
        downsample_ratio=0.5,
    )


def _square(image_processor_class, **settings):
    return lambda: getattr(hf, image_processor_class)(size={"height": 32, "width": 32}, **settings)


def _clip(image_processor_class, **settings):
    crop = {"height": 32, "width": 32}
    return lambda: getattr(hf, image_processor_class)(size={"shortest_edge": 32}, crop_size=crop, **settings)


def _qwen_images():
    return hf.Qwen2VLImageProcessorPil(
        size={"shortest_edge": 16 * 16, "longest_edge": 64 * 64}, patch_size=8, merge_size=2, temporal_patch_size=2
    )


def _idefics_images(image_processor_class):
    return lambda: getattr(hf, image_processor_class)(
        size={"longest_edge": 64}, max_image_size={"longest_edge": 32}, do_image_splitting=True
    )


def _vipllava(ids):
    return hf.VipLlavaConfig(
        vision_config=hf.CLIPVisionConfig(**VISION, image_size=32),
        text_config=hf.LlamaConfig(**TEXT),
        image_token_index=ids("<image>"),
        vision_feature_layers=[-2, -1, 1],
    )


def _aya_vision(ids):
    return hf.AyaVisionConfig(
        vision_config=hf.SiglipVisionConfig(**VISION, image_size=32, vision_use_head=False),
        text_config=hf.Cohere2Config(**TEXT, sliding_window=32, layer_types=["sliding_attention", "full_attention"]),
        image_token_index=ids("<|IMG_PATCH|>"),
        downsample_factor=2,
    )


QWEN_TOKENS = ("<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
QWEN_TEMPLATE = CHATML.replace("IMAGE", "<|vision_start|><|image_pad|><|vision_end|>")
QWEN3_VISION = dict(depth=2, hidden_size=32, out_hidden_size=64, num_position_embeddings=64)
IDEFICS_TOKENS = (
    "<image>",
    "<fake_token_around_image>",
    "<global-img>",
    "<end_of_utterance>",
    "<|im_start|>",
    *(f"<row_{i}_col_{j}>" for i in range(1, 3) for j in range(1, 3)),
)


def _llava_family(make_config):
    settings = dict(patch_size=8, vision_feature_select_strategy="default", num_additional_image_tokens=1)
    return Family(
        {}, ("<image>",), "LlavaProcessor", _clip("CLIPImageProcessorPil"), settings, CHAT_TEMPLATE, make_config
    )


def _qwen_family(processor_class, config_class, **settings):
    make_config = _qwen(config_class, **settings)
    return Family({}, QWEN_TOKENS, processor_class, _qwen_images, {}, QWEN_TEMPLATE, make_config)


FAMILIES: dict[str, Family] = {
    "llava": _llava_family(_llava),
    "llava_next": Family(
        {},
        ("<image>",),
        "LlavaNextProcessor",
        _clip("LlavaNextImageProcessorPil", image_grid_pinpoints=[[32, 64], [64, 32], [64, 64]]),
        dict(patch_size=8, vision_feature_select_strategy="default", num_additional_image_tokens=1),
        MISTRAL,
        _llava_next,
    ),
    "llava_onevision": Family(
        {},
        ("<image>", "<video>", "<|im_start|>", "<|im_end|>"),
        "LlavaOnevisionProcessor",
        _square("LlavaOnevisionImageProcessorPil", image_grid_pinpoints=[[32, 32], [32, 64], [64, 32], [64, 64]]),
        dict(num_image_tokens=16, vision_feature_select_strategy="full", vision_aspect_ratio="anyres_max_9"),
        CHATML.replace("IMAGE", "<image>\n"),
        _llava_onevision,
    ),
    "qwen2_vl": _qwen_family("Qwen2VLProcessor", hf.Qwen2VLConfig, depth=2, embed_dim=32, hidden_size=64, mlp_ratio=2),
    "qwen2_5_vl": _qwen_family(
        "Qwen2_5_VLProcessor",
        hf.Qwen2_5_VLConfig,
        depth=2,
        hidden_size=32,
        out_hidden_size=64,
        window_size=32,
        fullatt_block_indexes=[1],
    ),
    "qwen3_vl": _qwen_family("Qwen3VLProcessor", hf.Qwen3VLConfig, **QWEN3_VISION, deepstack_visual_indexes=[0, 1]),
    "qwen3_vl_moe": _qwen_family(
        "Qwen3VLProcessor",
        hf.Qwen3VLMoeConfig,
        text=dict(moe_intermediate_size=32, num_experts=4, num_experts_per_tok=2),
        **QWEN3_VISION,
        deepstack_visual_indexes=[0, 1],
    ),
    "qwen3_5": _qwen_family(
        "Qwen3VLProcessor",
        hf.Qwen3_5Config,
        text=dict(
            layer_types=["linear_attention", "full_attention"],
            linear_num_key_heads=2,
            linear_num_value_heads=4,
            linear_key_head_dim=16,
            linear_value_head_dim=16,
        ),
        **QWEN3_VISION,
    ),
    "vipllava": _llava_family(_vipllava),
    "gemma3": Family(
        {"boi_token": "<start_of_image>", "eoi_token": "<end_of_image>", "image_token": "<image_soft_token>"},
        ("<start_of_turn>", "<end_of_turn>"),
        "Gemma3Processor",
        _square("Gemma3ImageProcessorPil"),
        dict(image_seq_length=4),
        GEMMA,
        _gemma3,
    ),
    "paligemma": Family(
        {"image_token": "<image>"},
        (),
        "PaliGemmaProcessor",
        _square("SiglipImageProcessorPil", image_seq_length=16),
        {},
        None,
        _paligemma,
    ),
    "idefics3": Family(
        {},
        IDEFICS_TOKENS,
        "Idefics3Processor",
        _idefics_images("Idefics3ImageProcessorPil"),
        dict(image_seq_len=4),
        IDEFICS,
        _idefics(hf.Idefics3Config, hf.Idefics3VisionConfig),
    ),
    "smolvlm": Family(
        {},
        (*IDEFICS_TOKENS, "<video>"),
        "SmolVLMProcessor",
        _idefics_images("SmolVLMImageProcessorPil"),
        dict(image_seq_len=4),
        IDEFICS,
        _idefics(hf.SmolVLMConfig, hf.SmolVLMVisionConfig),
    ),
    "internvl": Family(
        {
            "start_image_token": "<img>",
            "end_image_token": "</img>",
            "context_image_token": "<IMG_CONTEXT>",
            "video_token": "<video>",
        },
        ("<|im_start|>", "<|im_end|>"),
        "InternVLProcessor",
        _square("GotOcr2ImageProcessorPil", crop_to_patches=True, min_patches=1, max_patches=4),
        dict(image_seq_length=4),
        CHATML.replace("IMAGE", "<IMG_CONTEXT>\n"),
        _internvl,
    ),
}


# Not supported by the package: the worked example in modeling_safevlm/README.md adds its adapter.
EXAMPLE = Family(
    {},
    (
        "<image>",
        "<|IMG_PATCH|>",
        "<|START_OF_IMG|>",
        "<|END_OF_IMG|>",
        "TILE_GLOBAL",
        *(f"TILE_{i}" for i in range(1, 5)),
        "<|im_start|>",
        "<|im_end|>",
    ),
    "AyaVisionProcessor",
    _square("GotOcr2ImageProcessorPil", crop_to_patches=True, min_patches=1, max_patches=4),
    dict(patch_size=16, img_size=32),
    CHATML.replace("IMAGE", "<image>"),
    _aya_vision,
)


def build(family: str, seed: int = 0, tie: bool = False):
    """A tiny base model and its own processor."""
    spec = EXAMPLE if family == "aya_vision" else FAMILIES[family]
    tokenizer = tiny_tokenizer(spec.more_tokens, **spec.tokens)
    processor_class = base_processor_class(spec.processor_class)
    processor = processor_class(
        image_processor=spec.image_processor(),
        tokenizer=tokenizer,
        chat_template=spec.chat_template,
        **spec.settings,
    )
    config = spec.make_config(tokenizer.convert_tokens_to_ids)
    config.tie_word_embeddings = config.get_text_config().tie_word_embeddings = tie
    torch.manual_seed(seed)
    model = hf.AutoModelForImageTextToText.from_config(config).eval()
    model.generation_config = hf.GenerationConfig(**TOKEN_IDS, max_new_tokens=8)
    return model, processor


TABLE_START, TABLE_END = "<!-- families: written by the tests -->", "<!-- end of families -->"


def write_table(path: Path, results: dict[tuple[str, str], list[str]]):
    """Writes a table of test outcomes, `results[family, column]`, between the two marks in the file at `path`."""
    columns = list(dict.fromkeys(column for _, column in results))
    rows = [f"| family (`model_type`) | {' | '.join(columns)} |", f"|---|{':-:|' * len(columns)}"]
    for family in FAMILIES:
        cells = [_cell(results.get((family, column), [])) for column in columns]
        rows.append(f"| `{family}` | {' | '.join(cells)} |")
    before, _, rest = path.read_text(encoding="utf-8").partition(TABLE_START)
    _, _, after = rest.partition(TABLE_END)
    if not rest or not after:
        raise ValueError(f"{path} must contain the marks {TABLE_START!r} and {TABLE_END!r} around the table.")
    path.write_text("\n".join([before + TABLE_START, "", *rows, "", TABLE_END]) + after, encoding="utf-8")


def _cell(outcomes: list[str]) -> str:
    if not outcomes:
        return "not run"
    return "✓" if set(outcomes) == {"passed"} else "skipped" if set(outcomes) == {"skipped"} else "**fails**"
