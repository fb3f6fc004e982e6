"""How a stage trains a model that is in half precision or quantised, and how it gets a plain one back."""

from contextlib import contextmanager

import torch

from safevlm import SafeVlmForConditionalGeneration

from .training_args import SafeVlmTrainingArguments


def check_weights(model, args: SafeVlmTrainingArguments):
    """Raises `ValueError` for weights that cannot be trained as they are: offloaded, or of another half precision."""
    offloaded = [name for name, parameter in model.named_parameters() if parameter.device.type == "meta"]
    if offloaded:
        raise ValueError(
            f"{len(offloaded)} weights of the model are offloaded to CPU or disk, such as {offloaded[0]}; it cannot "
            f"be trained like that. Load it without `device_map`, or quantised, or train with FSDP."
        )
    dtypes = {parameter.dtype for parameter in model.parameters()}
    for mixed, other, instead in ((args.bf16, torch.float16, "bfloat16"), (args.fp16, torch.bfloat16, "float16")):
        if mixed and other in dtypes:
            raise ValueError(
                f"The model is in {str(other).removeprefix('torch.')}, which `{'bf16' if args.bf16 else 'fp16'}=true` "
                f"cannot be mixed with. Load it with `dtype='{instead}'` (`safevlm train --dtype {instead}`)."
            )


def train_in_float32(model, args: SafeVlmTrainingArguments):
    """
    Gives half-precision weights that train float32 master weights: AdamW's small steps round away in bfloat16, and
    its epsilon in float16. With mixed precision (`bf16`, `fp16`) all of them; without, the safety modules only, which
    convert at their borders, and the language model trains in the dtype it was loaded in.
    """
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and (args.bf16 or args.fp16 or "safety" in name.split(".")):
            parameter.data = parameter.data.float()


def align_storage(model):
    """
    Moves weights that lie at odd addresses (those of a mapped checkpoint file) to memory of their own.

    CPU kernels round differently there: a run resumed from a file would drift from one that was never interrupted.
    """
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.device.type == "cpu" and tensor.data_ptr() % 64:
            tensor.data = tensor.data.clone()


@contextmanager
def quantized_base_allowed(model):
    """
    `Trainer` refuses a quantised model without LoRA; ours may train its safety modules, which are not quantised
    (a quantised weight cannot be made trainable, see `set_trainable`).
    """
    quantized = isinstance(model, SafeVlmForConditionalGeneration) and getattr(model, "is_quantized", False)
    if quantized:
        model.is_quantized = False
    try:
        yield
    finally:
        if quantized:
            model.is_quantized = True
