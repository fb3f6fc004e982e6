"""How a stage trains a model that is in half precision, quantised or sharded, and how it gets a plain one back."""

import copy
from contextlib import contextmanager
from pathlib import Path

import torch
from accelerate import PartialState
from torch import nn

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


def check_sharding(trainer):
    """Raises `ValueError` for a way to shard the model that a stage could not end."""
    state = trainer.accelerator.state
    if trainer.args.fsdp and not trainer.is_fsdp_enabled:
        raise ValueError("`fsdp` was asked for, but accelerate shards over GPUs only. Leave it out on the CPU.")
    if trainer.is_fsdp_enabled:
        if state.fsdp_plugin.fsdp_version != 2:
            raise ValueError("`fsdp_config` asks for FSDP version 1; use version 2 (the default).")
        if "SHARDED" not in str(state.fsdp_plugin.state_dict_type):
            raise ValueError("`fsdp_config` needs `state_dict_type: SHARDED_STATE_DICT` (the default) to resume.")
        if any(not parameter.is_floating_point() for parameter in trainer.model.parameters()):
            raise ValueError("A quantised base cannot be trained under FSDP. Use DDP, or load it unquantised.")
    if trainer.is_deepspeed_enabled and state.deepspeed_plugin.zero_stage == 3:
        raise ValueError(
            "DeepSpeed ZeRO-3 splits the weights, and a stage needs them whole at its end. Use ZeRO-2 "
            "(`deepspeed=zero2`) or FSDP (`fsdp=true`)."
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


def without_weights(model: nn.Module) -> nn.Module:
    """A copy of `model` whose parameters are on "meta" and take no memory; buffers are copied."""
    memo = {
        id(parameter): nn.Parameter(torch.empty_like(parameter, device="meta"), requires_grad=parameter.requires_grad)
        for parameter in model.parameters()
    }
    return copy.deepcopy(model, memo)


def gather_weights(sharded: nn.Module, empty: nn.Module) -> nn.Module:
    """Fills `empty` (see `without_weights`) with the weights of an FSDP model, on every process; returns it."""
    from torch.distributed.tensor import DTensor

    weights = {}
    for name, tensor in sharded.state_dict().items():
        # One after the other, so that the device never holds all of them.
        weights[name] = (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().cpu()
    empty.load_state_dict(weights, assign=True)
    plain = empty.get_base_model() if hasattr(empty, "get_base_model") else empty
    plain.tie_weights()
    return empty


def merge_lora(model, adapter: Path):
    """
    Saves LoRA weights and safety modules of a PEFT model to the folder `adapter`; returns the plain model with LoRA
    merged. A quantised base comes back in the dtype it computes in: LoRA's small changes would be lost in rounding.
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
    """A plain copy of a PEFT model with LoRA merged; the model itself trains on."""
    if getattr(model.get_base_model(), "is_quantized", False):
        raise ValueError("LoRA on a quantised base can be merged, and the model be saved, after `train()` only.")
    return copy.deepcopy(model).merge_and_unload()


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
