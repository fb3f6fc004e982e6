"""Models sharded over devices: which kinds of sharding are supported, and how a sharded model becomes plain again."""

import copy

import torch
from torch import nn


def check_sharding(trainer):
    """Raises `ValueError` for sharding from which the end of a stage could not restore the plain model."""
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
            "DeepSpeed ZeRO-3 splits the weights, but a stage needs them complete at its end. Use ZeRO-2 "
            "(`deepspeed=zero2`) or FSDP (`fsdp=true`)."
        )


def without_weights(model: nn.Module) -> nn.Module:
    """A copy of `model` with parameters on the device "meta", where they take no memory. Buffers are copied."""
    memo = {
        id(parameter): nn.Parameter(torch.empty_like(parameter, device="meta"), requires_grad=parameter.requires_grad)
        for parameter in model.parameters()
    }
    return copy.deepcopy(model, memo)


def gather_weights(sharded: nn.Module, empty: nn.Module) -> nn.Module:
    """Fills `empty` (see `without_weights`) with the weights of an FSDP model, on every process, and returns it."""
    from torch.distributed.tensor import DTensor

    weights = {}
    for name, tensor in sharded.state_dict().items():
        # One at a time, so that the device never holds all of them.
        weights[name] = (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().cpu()
    empty.load_state_dict(weights, assign=True)
    plain = empty.get_base_model() if hasattr(empty, "get_base_model") else empty
    plain.tie_weights()
    return empty
