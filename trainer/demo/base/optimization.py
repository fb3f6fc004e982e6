"""Optimisers of the demo's base: Muon for the language model's matrices and AdamW for the rest, under one schedule.

Muon (Jordan et al., 2024) orthogonalises the momentum of a matrix. On the tiny Llama it reaches the same accuracy in
about half of AdamW's steps. `torch.optim.Muon` computes in bfloat16: on a CPU without bfloat16 arithmetic its update
takes several times as long as the rest of the step. This one stays in float32 and updates all matrices of a shape at
once.
"""

from collections import defaultdict
from collections.abc import Iterable, Sequence

import torch
from torch import nn
from transformers import get_cosine_schedule_with_warmup


class Muon(torch.optim.Optimizer):
    """Momentum, orthogonalised by five Newton-Schulz iterations and scaled to the typical size of AdamW's updates."""

    def __init__(self, params: Iterable[nn.Parameter], lr: float, momentum: float = 0.95, weight_decay: float = 0.01):
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure=None) -> None:
        for group in self.param_groups:
            by_shape: dict[torch.Size, list[nn.Parameter]] = defaultdict(list)
            for parameter in group["params"]:
                by_shape[parameter.shape].append(parameter)
            for shape, parameters in by_shape.items():
                for parameter in parameters:
                    buffer = self.state[parameter].setdefault("momentum", torch.zeros_like(parameter))
                    buffer.lerp_(parameter.grad, 1 - group["momentum"])
                updates = torch.stack([p.grad.lerp(self.state[p]["momentum"], group["momentum"]) for p in parameters])
                updates = _orthogonalize(updates) * (0.2 * max(shape) ** 0.5 * group["lr"])
                for parameter, update in zip(parameters, updates, strict=True):
                    parameter.mul_(1 - group["lr"] * group["weight_decay"]).sub_(update)


def _orthogonalize(matrices: torch.Tensor, iterations: int = 5) -> torch.Tensor:
    """Approximates `U V^T` of each matrix `U S V^T`; the shape is `(n, rows, columns)`."""
    wide = matrices.shape[1] <= matrices.shape[2]
    x = matrices if wide else matrices.mT
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(iterations):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=-4.7750, alpha=2.0315), x, beta=3.4445)
    return x if wide else x.mT


class Optimizers:
    """Several optimisers under one warm-up-and-cosine schedule, with gradients clipped to norm 1."""

    def __init__(self, optimizers: Sequence[torch.optim.Optimizer], steps: int):
        self.optimizers = list(optimizers)
        self.schedules = [get_cosine_schedule_with_warmup(o, max(steps // 15, 1), steps) for o in self.optimizers]
        self.parameters = [p for o in self.optimizers for group in o.param_groups for p in group["params"]]

    def step(self) -> None:
        nn.utils.clip_grad_norm_(self.parameters, 1.0)
        for optimizer, schedule in zip(self.optimizers, self.schedules, strict=True):
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()


def adamw(parameters: Iterable[nn.Parameter], learning_rate: float) -> torch.optim.AdamW:
    return torch.optim.AdamW(parameters, lr=learning_rate, betas=(0.9, 0.98), weight_decay=0.01, fused=True)
