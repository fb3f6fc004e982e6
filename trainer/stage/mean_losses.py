"""What the named losses are means over, and their means over a step or an evaluation, whatever its micro-batches."""

import torch

from safevlm.safety_modules import IGNORE_INDEX

LOSS_NAMES = ("lm_loss", "safety_level_loss", "safety_category_loss")


class Numbers:
    """
    How many tokens or rows each loss is over: answers' tokens; rows with a label and a picture.

    Args:
        image_token_id (`int`)
    """

    def __init__(self, image_token_id: int):
        self.image_token_id = image_token_id

    def of_batch(self, inputs) -> dict[str, int]:
        return dict(zip(LOSS_NAMES, self._count(inputs).tolist(), strict=True))

    def of_step(self, batches, accelerator) -> dict[str, int]:
        """Of all micro-batches of all processes."""
        none = torch.zeros(len(LOSS_NAMES), dtype=torch.long, device=accelerator.device)
        counts = sum((self._count(batch).to(accelerator.device) for batch in batches), none)
        return dict(zip(LOSS_NAMES, accelerator.reduce(counts, "sum").tolist(), strict=True))

    def _count(self, inputs) -> torch.Tensor:
        has_picture = (inputs["input_ids"] == self.image_token_id).any(dim=1)
        counts = torch.zeros(len(LOSS_NAMES), dtype=torch.long, device=has_picture.device)
        if "labels" in inputs:
            counts[0] = (inputs["labels"][:, 1:] != IGNORE_INDEX).sum()
        for i, name in enumerate(("safety_level_labels", "safety_category_labels"), start=1):
            if name in inputs:
                counts[i] = ((inputs[name] != IGNORE_INDEX) & has_picture).sum()
        return counts


class MeanLosses:
    """Sums of losses, and how many tokens or rows they are over."""

    def __init__(self):
        self.sums = torch.zeros(len(LOSS_NAMES), 2, dtype=torch.float64)

    def add(self, outputs, numbers: dict[str, int], lm_divided_by=None):
        """
        Args:
            outputs (`SafeVlmOutput`): Of one batch.
            numbers (`dict[str, int]`): The batch's.
            lm_divided_by (*optional*): Number of tokens that `lm_loss` is divided by, if not the batch's.
        """
        for i, name in enumerate(LOSS_NAMES):
            if (loss := outputs.get(name)) is not None:
                divided_by = lm_divided_by if name == "lm_loss" and lm_divided_by is not None else numbers[name]
                self.sums[i, 0] += (loss.detach() * divided_by).double().cpu()
                self.sums[i, 1] += numbers[name]

    def means(self, accelerator) -> dict[str, float]:
        """Over all processes, so that these agree on when to stop early. A loss without a token or row is left out."""
        sums = accelerator.reduce(self.sums.float().to(accelerator.device), "sum").cpu()
        return {
            name: (total / number).item() for name, (total, number) in zip(LOSS_NAMES, sums, strict=True) if number
        }
