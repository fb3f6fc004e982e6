"""Where a module computes, when a model is split over devices or offloaded."""

import torch
from torch import nn


def compute_device(module: nn.Module) -> torch.device:
    """
    The device that `module` computes on.

    That is not always where its weights lie: those of an offloaded module are on "meta" until accelerate's hooks
    bring them in, so a tensor must never be moved to `weight.device`.
    """
    for child in module.modules():
        hook = getattr(child, "_hf_hook", None)
        for part in getattr(hook, "hooks", [hook]):
            if getattr(part, "execution_device", None) is not None:
                return torch.device(part.execution_device)
        for weight in child.parameters(recurse=False):
            if weight.device.type != "meta":
                return weight.device
    return torch.device("cpu")
