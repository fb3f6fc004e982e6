"""A safety adapter: what training added to a base model, in a small folder that `from_base` can put on the base again.

    config.json                    the whole model's configuration
    safety_adapter.safetensors     the safety modules; or, if LoRA trained the language model,
    lora/                          LoRA and safety modules, as PEFT saves them

PEFT's files are in a subfolder because at the top `AutoModel.from_pretrained` would take them for an adapter of the
base and load the base without any safety. This file is not part of the code that a saved model carries.
"""

import copy
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from safetensors.torch import load_file, save_file
from torch import nn
from transformers.integrations.accelerate import load_offloaded_parameter

from .adapter_files import ADAPTER_WEIGHTS, LORA_WEIGHTS
from .backbones import get_backbone
from .configuration_safevlm import SafeVlmConfig
from .files import is_hub_id, replacing
from .loading_checks import check_safety_weights


def save_safety_adapter(model, save_directory):
    """Saves the safety modules alone, for `from_base(base, safety_adapter=save_directory)`."""
    folder = Path(save_directory)
    weights = {name: tensor.contiguous() for name, tensor in whole_state_dict(model.safety).items()}
    with replacing(folder / ADAPTER_WEIGHTS) as partial:
        save_file(weights, partial, metadata={"format": "pt"})
    model.config.save_pretrained(folder)


def adapter_folder(safety_adapter) -> Path:
    """
    The folder of an adapter, downloaded if `safety_adapter` is a Hub id.

    Raises:
        `ValueError`: The folder does not hold an adapter.
    """
    folder = Path(safety_adapter)
    if not folder.is_dir() and is_hub_id(str(safety_adapter)):
        folder = Path(snapshot_download(str(safety_adapter), allow_patterns=["*.json", "*.safetensors"]))
    if not any((folder / name).is_file() for name in (ADAPTER_WEIGHTS, LORA_WEIGHTS)):
        raise ValueError(
            f"`safety_adapter` {str(safety_adapter)!r} has no {ADAPTER_WEIGHTS} or {LORA_WEIGHTS}; make one with "
            f"`model.save_safety_adapter(folder)`, or `safevlm push FOLDER --adapter-only` from a trained model."
        )
    return folder


def adapter_config(folder: Path, base_config) -> SafeVlmConfig:
    """
    The adapter's configuration.

    Raises:
        `ValueError`: The adapter was made for another kind of base.
    """
    config = SafeVlmConfig.from_pretrained(folder)
    made_for = config.base_config
    for what, get in (
        ("model type", lambda c: c.model_type),
        ("language model width", lambda c: c.get_text_config().hidden_size),
        ("vision width", lambda c: get_backbone(c).vision_hidden_size),
        ("image token id", lambda c: c.image_token_id),
    ):
        if get(made_for) != get(base_config):
            raise ValueError(
                f"The safety adapter {str(folder)!r} was made for a base with {what} {get(made_for)}, "
                f"this base has {get(base_config)}."
            )
    config = copy.deepcopy(config)
    config.base_config = base_config
    return config


def load_adapter_weights(model, folder: Path):
    """Loads an adapter's weights into a model with the adapter's configuration, merges LoRA, and returns the model."""
    if not (folder / LORA_WEIGHTS).is_file():
        model.safety.load_state_dict(load_file(folder / ADAPTER_WEIGHTS))
        check_safety_weights(model.safety, str(folder))
        return model
    if getattr(model.base, "is_quantized", False):
        raise ValueError(
            f"The safety adapter {str(folder)!r} holds LoRA, whose small changes would be lost in a quantised base. "
            f"Load the base unquantised, save the model, and quantise that: "
            f"`from_pretrained(saved, quantization_config=...)`."
        )
    try:
        from peft import PeftModel, get_peft_model_state_dict
    except ImportError as error:
        raise ImportError(f"The safety adapter {str(folder)!r} holds LoRA: pip install 'safevlm[train]'.") from error
    weights = load_file(folder / LORA_WEIGHTS)
    _check_complete(folder, weights, {f"base_model.model.safety.{name}" for name in model.safety.state_dict()})
    adapted = PeftModel.from_pretrained(model, (folder / LORA_WEIGHTS).parent)
    lora = {name for name in get_peft_model_state_dict(adapted) if ".safety." not in name}
    _check_complete(folder, weights, lora)  # PEFT only warns of missing ones
    if broken := [name for name, weight in weights.items() if not weight.isfinite().all()]:
        raise ValueError(f"The safety adapter {str(folder)!r} is damaged: {broken[0]} is not finite.")
    model = adapted.merge_and_unload()
    check_safety_weights(model.safety, str(folder))
    return model


def _check_complete(folder: Path, weights: dict, expected: set[str]):
    if missing := sorted(expected - set(weights)):
        safety = sum(".safety." in name for name in missing)
        raise ValueError(
            f"The safety adapter {str(folder)!r} lacks {len(missing)} weights, {safety} of them safety weights "
            f"({', '.join(missing[:3])}, ...): save it again."
        )


def whole_state_dict(module: nn.Module) -> dict[str, torch.Tensor]:
    """`module.state_dict()`, with offloaded weights read back to the CPU."""
    return {
        name: load_offloaded_parameter(module, name) if tensor.device.type == "meta" else tensor
        for name, tensor in module.state_dict().items()
    }
