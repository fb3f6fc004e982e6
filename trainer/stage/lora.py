"""LoRA on the language model: added for a stage, merged at its end."""

import copy
import re
from contextlib import nullcontext
from pathlib import Path

from accelerate import PartialState
from torch import nn

from safevlm import SafeVlmForConditionalGeneration
from safevlm.trainer.peft_without_bitsandbytes import without_bitsandbytes

from .training_args import SafeVlmTrainingArguments


def language_model_parts(model: SafeVlmForConditionalGeneration) -> tuple[str, str]:
    """Names of the language model, where LoRA goes, and of its output layer: what `"language_model"` trains."""
    names = {id(module): name for name, module in model.named_modules()}
    return names[id(model.get_decoder())], names[id(model.get_output_embeddings())]


def add_lora(model: SafeVlmForConditionalGeneration, args: SafeVlmTrainingArguments):
    """Adds LoRA to the language model's linear layers; the safety modules train in full. Returns PEFT's wrapper."""
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as error:
        raise ImportError("LoRA needs peft: pip install 'safevlm[train]'.") from error
    prefix, _ = language_model_parts(model)
    leaves = sorted(
        {
            name.rsplit(".", 1)[-1]
            for name, module in model.named_modules()
            if name.startswith(prefix + ".") and isinstance(module, nn.Linear)
        }
    )
    config = LoraConfig(
        r=args.lora_r,
        lora_alpha=args.lora_alpha,
        lora_dropout=args.lora_dropout,
        target_modules=rf"{re.escape(prefix)}\..*\.({'|'.join(leaves)})",
        modules_to_save=["safety"] if "safety" in args.trainable else None,
    )
    with nullcontext() if getattr(model, "is_quantized", False) else without_bitsandbytes():
        return get_peft_model(model, config)


def merge_lora(model, adapter: Path):
    """
    Saves LoRA weights and safety modules of a PEFT model to the folder `adapter` and returns the plain model with LoRA
    merged. A quantised base is dequantised: its rounding would lose LoRA's small changes.
    """
    from peft import PeftModel

    state = PartialState()
    if state.is_main_process:
        model.save_pretrained(adapter)
    state.wait_for_everyone()
    if getattr(model.get_base_model(), "is_quantized", False):
        plain = model.unload()
        plain.dequantize()
        model = PeftModel.from_pretrained(plain, adapter)
    return model.merge_and_unload()


def merged_copy(model):
    """A plain copy of a PEFT model with LoRA merged. The model itself is unchanged and can train on."""
    if getattr(model.get_base_model(), "is_quantized", False):
        raise ValueError(
            "With LoRA on a quantised base, the model can be saved after `train()` only, which merges LoRA."
        )
    return copy.deepcopy(model).merge_and_unload()
