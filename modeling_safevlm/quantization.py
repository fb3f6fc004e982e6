"""Quantised models: the base is quantised, safety modules and the output layer stay in full precision.

transformers quantises every linear layer that a quantisation config does not name. Both ways to a quantised SafeVLM
end in the same state: `from_pretrained(safe_model, quantization_config=...)`, where [`keep_safety_modules`] names
them, and `from_base(base, base_kwargs={"quantization_config": ...})`, where [`keep_output_layer`] does. Then
[`share_quantization`] makes wrapper and base agree, so that each can be saved, reloaded and trained (QLoRA) by itself.

On CPUs with AVX512-BF16 bitsandbytes packs a 4-bit weight anew at its first inference, for a faster product. It
crashes on widths that do not fill its blocks, and a packed weight passes no gradients and dequantises to noise. So
layers of such widths stay unpacked ([`share_quantization`]), and all are unpacked to be trained or dequantised
([`unpack`]).
"""

import copy

from transformers.quantizers.auto import AutoQuantizationConfig

# What the quantisation configs of transformers call the modules to leave as they are.
SKIP_LISTS = ("llm_int8_skip_modules", "modules_to_not_convert", "skip_modules")
OUTPUT_LAYER = "lm_head"
PACKED_OUTPUTS = 32  # how many outputs of a 4-bit layer are packed together
MARKS = ("is_quantized", "quantization_method", "is_loaded_in_8bit", "is_loaded_in_4bit")


def keep_safety_modules(quantization_config):
    """
    A copy of a quantisation config that leaves safety modules and the output layer in full precision.

    Args:
        quantization_config (`QuantizationConfigMixin` or `dict`): Modules that it leaves out already stay left out;
            they can be named as in the base model (`"model.vision_tower"`) or as here (`"base.model.vision_tower"`).
    """
    return _with_skipped(quantization_config, lambda names: _wrapper_names([*names, OUTPUT_LAYER]))


def keep_output_layer(quantization_config):
    """The same for a base model: an explicit list of modules to leave out would drop the default, the output layer."""
    return _with_skipped(quantization_config, lambda names: sorted({*names, OUTPUT_LAYER}))


def share_quantization(model):
    """Marks the wrapper of a quantised base, or the base of a quantised wrapper, as quantised in the same way."""
    if getattr(model.base, "hf_quantizer", None) is not None:
        source, target, names = model.base, model, _wrapper_names
    elif getattr(model, "hf_quantizer", None) is not None:
        source, target, names = model, model.base, _base_names
    else:
        return
    quantizer = copy.copy(source.hf_quantizer)
    quantizer.quantization_config = copy.deepcopy(quantizer.quantization_config)
    # The quantizer knows the modules that it left out by default, too.
    skipped = getattr(quantizer, "modules_to_not_convert", None) or _get_skipped(quantizer.quantization_config)
    quantizer.modules_to_not_convert = names(skipped)
    _set_skipped(quantizer.quantization_config, names(skipped))
    target.hf_quantizer = quantizer
    target.config.quantization_config = quantizer.quantization_config
    for mark in MARKS:
        if hasattr(source, mark):
            setattr(target, mark, getattr(source, mark))
    for layer in _packing_layers(model):
        if layer.out_features % PACKED_OUTPUTS or layer.in_features % layer.weight.blocksize:
            layer.support_avx512bf16_for_cpu = False


def unpack(model):
    """Unpacks 4-bit weights that bitsandbytes packed for this CPU, and keeps it from packing them again."""
    for layer in _packing_layers(model):
        layer.support_avx512bf16_for_cpu = False
        layer.state_dict()  # a packed weight is not written: this unpacks it
        if getattr(layer.weight.quant_state, "packing_format_for_cpu", False):
            raise RuntimeError("This release of bitsandbytes does not unpack its 4-bit weights. Use a GPU, or 8 bit.")


def _packing_layers(model):
    return [module for module in model.modules() if getattr(module, "support_avx512bf16_for_cpu", False)]


def _with_skipped(quantization_config, change):
    if isinstance(quantization_config, dict):
        quantization_config = AutoQuantizationConfig.from_dict(quantization_config)
    config = copy.deepcopy(quantization_config)
    _set_skipped(config, change(_get_skipped(config)))
    return config


def _wrapper_names(skipped: list[str]) -> list[str]:
    # Names match from the start of a module's path, or at its end: "lm_head" is also "base.lm_head".
    inner = [f"base.{name}" for name in skipped if not name.startswith(("base.", "safety"))]
    return sorted({"safety", *skipped, *inner})


def _base_names(skipped: list[str]) -> list[str]:
    return sorted({name.removeprefix("base.") for name in skipped if not name.startswith("safety")})


def _skip_list(config) -> str:
    for name in SKIP_LISTS:
        if hasattr(config, name):
            return name
    raise ValueError(
        f"`quantization_config` of type {type(config).__name__} cannot leave modules out (it has none of "
        f"{', '.join(SKIP_LISTS)}), and the safety modules must not be quantised. Use `BitsAndBytesConfig`."
    )


def _get_skipped(config) -> list[str]:
    return list(getattr(config, _skip_list(config)) or [])


def _set_skipped(config, names: list[str]):
    setattr(config, _skip_list(config), names)


def forget_quantization(model):
    """After `dequantize`: neither wrapper nor base is quantised any more."""
    for part in (model, model.base):
        for mark in ("hf_quantizer", *MARKS):
            part.__dict__.pop(mark, None)
        if hasattr(part.config, "quantization_config"):
            del part.config.quantization_config
