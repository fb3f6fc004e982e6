"""Quantised models: the base is quantised, the safety modules and the output layer stay in full precision.

transformers quantises every linear layer that a quantisation config does not exclude. A quantised SafeVLM comes from
`from_pretrained(safe_model, quantization_config=...)` or from `from_base` on a quantised base. Either way
[`share_quantization`] makes model and base agree, so that each can be saved, reloaded and trained (QLoRA) by itself.

On CPUs with AVX512-BF16, bitsandbytes repacks a 4-bit weight at its first inference to multiply faster. It crashes on
widths that do not fill its blocks, and a packed weight passes no gradients and dequantises to noise. So layers of
such widths are never packed ([`share_quantization`]), and all are unpacked for training and dequantising ([`unpack`]).
"""

import copy

from transformers.quantizers.auto import AutoQuantizationConfig

# The names that transformers' quantisation configs have for their list of modules to exclude.
SKIP_LISTS = ("llm_int8_skip_modules", "modules_to_not_convert", "skip_modules")
OUTPUT_LAYER = "lm_head"  # excluded by default, but not beside an explicit list
PACKED_OUTPUTS = 32  # number of outputs of a 4-bit layer that are packed together
MARKS = ("is_quantized", "quantization_method", "is_loaded_in_8bit", "is_loaded_in_4bit")


class QuantizationMixin:
    """What a SafeVLM does where its base may be quantised."""

    def train(self, mode: bool = True):
        if mode:
            unpack(self)
        return super().train(mode)

    def dequantize(self, dtype=None):
        unpack(self)
        model = super().dequantize(dtype or self.dtype)
        for part in (model, model.base):
            for mark in ("hf_quantizer", *MARKS):
                part.__dict__.pop(mark, None)
            if hasattr(part.config, "quantization_config"):
                del part.config.quantization_config
        return model


def keep_safety_modules(quantization_config, base_only: bool = False):
    """
    A copy of a quantisation config that excludes the safety modules and the output layer.

    Args:
        quantization_config (`QuantizationConfigMixin` or `dict`): The modules that it excludes stay excluded. They
            can be named as in the base (`"model.vision_tower"`) or as in the SafeVLM (`"base.model.vision_tower"`).
        base_only (`bool`): Whether it is for a base model, which has no safety modules.
    """
    if isinstance(quantization_config, dict):
        quantization_config = AutoQuantizationConfig.from_dict(quantization_config)
    config = copy.deepcopy(quantization_config)
    skipped = [*_skipped(config), OUTPUT_LAYER]
    setattr(config, _skip_list(config), skipped if base_only else _wrapper_names(skipped))
    return config


def share_quantization(model):
    """Marks the SafeVLM of a quantised base, or the base of a quantised SafeVLM, as quantised in the same way."""
    if getattr(model.base, "hf_quantizer", None) is not None:
        source, target, names = model.base, model, _wrapper_names
    elif getattr(model, "hf_quantizer", None) is not None:
        source, target, names = model, model.base, _base_names
    else:
        return
    quantizer = copy.copy(source.hf_quantizer)
    config = quantizer.quantization_config = copy.deepcopy(quantizer.quantization_config)
    # The quantizer also knows the modules that it excluded by default.
    skipped = names(getattr(quantizer, "modules_to_not_convert", None) or _skipped(config))
    quantizer.modules_to_not_convert = skipped
    setattr(config, _skip_list(config), skipped)
    target.hf_quantizer, target.config.quantization_config = quantizer, config
    for mark in MARKS:
        if hasattr(source, mark):
            setattr(target, mark, getattr(source, mark))
    for layer in _packing_layers(model):
        if layer.out_features % PACKED_OUTPUTS or layer.in_features % layer.weight.blocksize:
            layer.support_avx512bf16_for_cpu = False


def unpack(model):
    """Unpacks the 4-bit weights that bitsandbytes packed for this CPU, and keeps it from packing them again."""
    for layer in _packing_layers(model):
        layer.support_avx512bf16_for_cpu = False
        layer.state_dict()  # unpacks the weight, since a packed one cannot be saved
        if getattr(layer.weight.quant_state, "packing_format_for_cpu", False):
            raise RuntimeError("This release of bitsandbytes does not unpack its 4-bit weights. Use a GPU, or 8 bit.")


def _packing_layers(model):
    return [module for module in model.modules() if getattr(module, "support_avx512bf16_for_cpu", False)]


def _wrapper_names(skipped: list[str]) -> list[str]:
    # A name matches the beginning of a module's path, or its end: "lm_head" is also "base.lm_head".
    inner = [f"base.{name}" for name in skipped if not name.startswith(("base.", "safety"))]
    return sorted({"safety", *skipped, *inner})


def _base_names(skipped: list[str]) -> list[str]:
    return sorted({name.removeprefix("base.") for name in skipped if not name.startswith("safety")})


def _skipped(config) -> list[str]:
    return list(getattr(config, _skip_list(config)) or [])


def _skip_list(config) -> str:
    for name in SKIP_LISTS:
        if hasattr(config, name):
            return name
    raise ValueError(
        f"`quantization_config` of type {type(config).__name__} cannot leave modules out (it has none of "
        f"{', '.join(SKIP_LISTS)}), and the safety modules must not be quantised. Use `BitsAndBytesConfig`."
    )
