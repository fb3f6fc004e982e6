"""Means of the named losses over a step or an evaluation, however it is split into micro-batches and processes."""

import torch

from safevlm.safety_labels import IGNORE_INDEX

LOSS_NAMES = ("lm_loss", "safety_level_loss", "safety_category_loss")


class LossCounts:
    """
    Counts what each loss is a mean over: the tokens of answers for `lm_loss`, the rows with a label and a picture for
    the safety losses.

    Args:
        image_token_id (`int`): Tells which rows have a picture.
    """

    def __init__(self, image_token_id: int):
        self.image_token_id = image_token_id

    def of_batch(self, inputs) -> dict[str, int]:
        return dict(zip(LOSS_NAMES, self._count(inputs).tolist(), strict=True))

    def of_step(self, batches, accelerator) -> dict[str, int]:
        """The counts of all micro-batches of a step, on all processes."""
        zero = torch.zeros(len(LOSS_NAMES), dtype=torch.long, device=accelerator.device)
        counts = sum((self._count(batch).to(accelerator.device) for batch in batches), zero)
        return dict(zip(LOSS_NAMES, accelerator.reduce(counts, "sum").tolist(), strict=True))

    def _count(self, inputs) -> torch.Tensor:
        has_picture = (inputs["input_ids"] == self.image_token_id).any(dim=1)  # (batch_size,)
        counts = torch.zeros(len(LOSS_NAMES), dtype=torch.long, device=has_picture.device)
        if "labels" in inputs:
            counts[0] = (inputs["labels"][:, 1:] != IGNORE_INDEX).sum()
        for i, name in enumerate(("safety_level_labels", "safety_category_labels"), start=1):
            if name in inputs:
                counts[i] = ((inputs[name] != IGNORE_INDEX) & has_picture).sum()
        return counts


class MeanLosses:
    """Accumulates losses, each weighted by the number of tokens or rows it is a mean over."""

    def __init__(self):
        self.sums = torch.zeros(len(LOSS_NAMES), 2, dtype=torch.float64)  # of losses x counts, and of counts

    def add(self, outputs, counts: dict[str, int], lm_divisor=None):
        """
        Args:
            outputs (`SafeVlmOutput`): Of one batch.
            counts (`dict[str, int]`): The batch's, from [`LossCounts`].
            lm_divisor (*optional*): Number of tokens that `lm_loss` was divided by, if not the batch's.
        """
        for i, name in enumerate(LOSS_NAMES):
            if (loss := outputs.get(name)) is not None:
                divisor = lm_divisor if name == "lm_loss" and lm_divisor is not None else counts[name]
                self.sums[i, 0] += (loss.detach() * divisor).double().cpu()
                self.sums[i, 1] += counts[name]

    def means(self, accelerator) -> dict[str, float]:
        """
        The means over all processes, so that they all decide alike when to stop early. A loss without any token or
        row is left out.
        """
        sums = accelerator.reduce(self.sums.float().to(accelerator.device), "sum").cpu()
        return {name: (total / count).item() for name, (total, count) in zip(LOSS_NAMES, sums, strict=True) if count}
