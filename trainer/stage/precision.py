"""Training models in half precision, and quantised ones."""

from contextlib import contextmanager

import torch

from safevlm import SafeVlmForConditionalGeneration

from .training_args import SafeVlmTrainingArguments


def check_weights(model, args: SafeVlmTrainingArguments):
    """Raises `ValueError` for weights that cannot be trained: offloaded ones, and those of the other half precision."""
    offloaded = [name for name, parameter in model.named_parameters() if parameter.device.type == "meta"]
    if offloaded:
        raise ValueError(
            f"{len(offloaded)} weights of the model are offloaded to CPU or disk, such as {offloaded[0]}, and "
            f"cannot be trained there. Load it without `device_map`, or quantised, or train with FSDP."
        )
    dtypes = {parameter.dtype for parameter in model.parameters()}
    for flag, clashing, needed in (("bf16", "float16", "bfloat16"), ("fp16", "bfloat16", "float16")):
        if getattr(args, flag) and getattr(torch, clashing) in dtypes:
            raise ValueError(
                f"The model is in {clashing}, which `{flag}=true` cannot be mixed with. Load it with "
                f"`dtype='{needed}'` (`safevlm train --dtype {needed}`)."
            )


def train_in_float32(model, args: SafeVlmTrainingArguments):
    """
    Converts trainable half-precision weights to float32: in bfloat16 AdamW's small steps round to nothing, and in
    float16 its epsilon does. With mixed precision (`bf16`, `fp16`) all trainable weights are converted. Without it
    only the safety modules are, which convert their inputs and outputs; the language model keeps its dtype.
    """
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and (args.bf16 or args.fp16 or "safety" in name.split(".")):
            parameter.data = parameter.data.float()


def align_storage(model):
    """
    Copies weights at unaligned addresses (those of a memory-mapped checkpoint) to aligned memory.

    CPU kernels round differently on unaligned memory: a resumed run would drift from an uninterrupted one.
    """
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.device.type == "cpu" and tensor.data_ptr() % 64:
            tensor.data = tensor.data.clone()


@contextmanager
def quantized_base_allowed(model):
    """
    Lets `Trainer` take a quantised model without LoRA, which it refuses. Here the safety modules can train: they are
    not quantised. (A quantised weight cannot be made trainable, see `set_trainable`.)
    """
    quantized = isinstance(model, SafeVlmForConditionalGeneration) and getattr(model, "is_quantized", False)
    if quantized:
        model.is_quantized = False
    try:
        yield
    finally:
        if quantized:
            model.is_quantized = True
