"""From a base model to a SafeVLM: `SafeVlmForConditionalGeneration.from_base`.

Making a model needs the package safevlm; using one does not. This file is not part of the code that a saved model
carries, which must stay small enough to review.
"""

from pathlib import Path

from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor, PreTrainedModel

from .backbones import compute_device, get_backbone
from .configuration_safevlm import SafeVlmConfig
from .quantization import keep_safety_modules, share_quantization
from .safety_adapter import adapter_config, adapter_folder, load_adapter_weights
from .safety_policy import SafetyPolicy

# The fields of SafeVlmConfig beside its base: the options of `from_base`.
SAFETY_FIELDS = [name for name in SafeVlmConfig.__annotations__ if name != "base_config"]


def from_base(
    cls, base, processor=None, config: SafeVlmConfig | None = None, safety_adapter=None, base_kwargs=None, **safety
):
    """
    Adds fresh safety modules, or those of an adapter, to a base model.

    Args:
        base (`str`, `Path` or `PreTrainedModel`): Hub id, folder or a loaded vision-language model.
        processor (*optional*): The [`SafeVlmProcessor`] that the model will be used with, or the base's own. Gives
            the placeholder's token id and the token ids of the policy's texts. Defaults to the processor of `base`.
        config (`SafeVlmConfig`, *optional*): The safety modules' configuration; its `base_config` is replaced by the
            base's. Defaults to `SafeVlmConfig()`.
        safety_adapter (`str` or `Path`, *optional*): Folder or Hub id of a safety adapter (see safety_adapter.py). It
            has its own configuration, which must fit the base.
        base_kwargs (`dict`, *optional*): For loading `base`: `dtype`, `device_map`, `quantization_config`, ...
        safety: Fields of [`SafeVlmConfig`] that override `config`, such as `num_prompt_tokens` or `safety_policy`.

    Returns:
        `SafeVlmForConditionalGeneration`
    """
    if "safety_policy" in safety:  # may be a file here, not in a configuration
        safety["safety_policy"] = SafetyPolicy.from_value(safety["safety_policy"])
    if isinstance(base, PreTrainedModel):
        name = base.config._name_or_path
    elif type(base).__module__.startswith("peft."):
        _refuse_peft(type(base).__name__)
    elif not isinstance(base, (str, Path)):
        raise TypeError(f"`base` must be a Hub id, a folder or a loaded model, got {type(base).__name__}.")
    else:
        name = str(base)
        if (Path(name) / "adapter_config.json").is_file():
            _refuse_peft(name)
        get_backbone(AutoConfig.from_pretrained(name))  # fails before gigabytes are read
        base_kwargs = dict(base_kwargs or {})
        if base_kwargs.get("quantization_config") is not None:
            base_kwargs["quantization_config"] = keep_safety_modules(
                base_kwargs["quantization_config"], base_only=True
            )
        base = AutoModelForImageTextToText.from_pretrained(name, **base_kwargs)
    get_backbone(base.config)
    if any(type(module).__module__.startswith("peft.") for module in base.modules()):
        _refuse_peft(name)
    if safety_adapter is not None:
        safety_adapter = adapter_folder(safety_adapter)
        config = adapter_config(safety_adapter, base.config)
    if unknown := sorted(set(safety) - set(SAFETY_FIELDS)):
        raise TypeError(f"`from_base` got the unknown option {unknown[0]!r}; known: {', '.join(SAFETY_FIELDS)}.")
    chosen = {} if config is None else {name: getattr(config, name) for name in SAFETY_FIELDS}
    config = SafeVlmConfig(**{**chosen, **safety}, base_config=base.config, dtype=base.dtype)
    if processor is None and safety_adapter is None:
        processor = AutoProcessor.from_pretrained(name)

    was_training = base.training
    model = wrap(cls, base, config)
    if processor is not None:
        _adopt_tokens(model, processor)
    if safety_adapter is not None:
        _make_room_for_placeholder(model)
        model = load_adapter_weights(model, safety_adapter)
    return model.train(was_training)


def _refuse_peft(name: str):
    raise ValueError(
        f"The base {name!r} carries a PEFT adapter (LoRA, say), with which a SafeVLM could not be loaded again. "
        f"Merge it first: `base = PeftModel.from_pretrained(base, adapter).merge_and_unload()`."
    )


def wrap(cls, base: PreTrainedModel, config: SafeVlmConfig):
    """Wraps a loaded base. Its weights stay as they are; the safety modules are initialised."""
    base._is_hf_initialized = True
    for module in base.modules():
        module._is_hf_initialized = True
    for parameter in base.parameters():
        parameter._is_hf_initialized = True
    model = cls(config, base=base)
    # The device of the input embeddings, since `device_map` may split the base over several.
    model.safety.to(device=compute_device(base.get_input_embeddings()), dtype=base.dtype)
    _share_device_map(model)
    share_quantization(model)
    return model


def _share_device_map(model):
    """Gives a model whose base was loaded with a `device_map` a device map of its own."""
    device_map = getattr(model.base, "hf_device_map", None)
    if device_map is not None:
        inner = {f"base.{name}" if name else "base": device for name, device in device_map.items()}
        safety = compute_device(model.safety)
        model.hf_device_map = {**inner, "safety": safety.type if safety.index is None else safety.index}


def _adopt_tokens(model, processor):
    """Takes the placeholder's id and the policy's texts from the processor."""
    tokenizer = getattr(processor, "tokenizer", processor)
    token = getattr(processor, "safety_token", "<safety>")
    token_id = tokenizer.convert_tokens_to_ids(token)
    known = token_id is not None and token_id != tokenizer.unk_token_id
    model.config.safety_token_id = token_id if known else len(tokenizer)
    _make_room_for_placeholder(model)
    model.set_safety_policy(model.config.safety_policy, processor)


def _make_room_for_placeholder(model):
    # Most checkpoints have spare rows in their embedding table. Other tables grow, and the logits with them.
    if model.config.safety_token_id >= model.base.get_input_embeddings().weight.shape[0]:
        model.resize_token_embeddings(model.config.safety_token_id + 1, pad_to_multiple_of=64)
