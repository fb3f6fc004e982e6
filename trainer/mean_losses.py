"""Means of the named losses over an evaluation, whatever its batches and processes."""

from collections.abc import Sequence

import torch

from safevlm.losses import IGNORE_INDEX


class MeanLosses:
    """
    Sums of losses, and how many tokens or rows they are over.

    Args:
        names (sequence of `str`)
    """

    def __init__(self, names: Sequence[str]):
        self.names = names
        self.sums = torch.zeros(len(names), 2, dtype=torch.float64)

    def add(self, name: str, total: torch.Tensor, number: torch.Tensor):
        self.sums[self.names.index(name)] += torch.stack([total.double(), number.to(total.device).double()]).cpu()

    def means(self, accelerator) -> dict[str, float]:
        """Over all processes, so that these agree on when to stop early. A loss without a token or row is left out."""
        sums = accelerator.reduce(self.sums.float().to(accelerator.device), "sum").cpu()
        return {
            name: (total / number).item() for name, (total, number) in zip(self.names, sums, strict=True) if number
        }


def labelled_rows(inputs, outputs, loss_name: str) -> torch.Tensor:
    """How many rows of a batch the loss is the mean of."""
    labels, assessed = inputs.get(loss_name.replace("_loss", "_labels")), outputs.get("safety_assessed")
    if labels is None or assessed is None:
        return torch.zeros((), dtype=torch.long)
    return ((labels != IGNORE_INDEX) & assessed.to(labels.device)).sum()
