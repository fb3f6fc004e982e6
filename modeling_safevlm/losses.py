"""The safety losses of stage 1 (paper section 3.3): cross entropy over levels and over categories, as named parts."""

import torch
import torch.nn.functional as F

IGNORE_INDEX = -100
"""Label of rows that have none, such as clean instruction data in stage 2."""


def safety_losses(
    level_logits: torch.Tensor,
    category_logits: torch.Tensor,
    level_labels: torch.Tensor | None,
    category_labels: torch.Tensor | None,
    assessed: torch.Tensor,
) -> dict[str, torch.Tensor | None]:
    """
    Args:
        level_logits (`torch.FloatTensor` of shape `(batch_size, num_levels)`)
        category_logits (`torch.FloatTensor` of shape `(batch_size, num_categories)`)
        level_labels, category_labels (`torch.LongTensor` of shape `(batch_size,)`, *optional*): -100 is ignored.
        assessed (`torch.BoolTensor` of shape `(batch_size,)`): `False` for rows without an image; ignored, too.

    Returns:
        `{"safety_level_loss", "safety_category_loss"}`: scalars, the mean over labelled rows; 0 (with a gradient of 0)
        where no row has a label, `None` where no labels were passed.
    """
    return {
        "safety_level_loss": _cross_entropy(level_logits, level_labels, assessed),
        "safety_category_loss": _cross_entropy(category_logits, category_labels, assessed),
    }


def _cross_entropy(logits, labels, assessed):
    if labels is None:
        return None
    labels = labels.to(logits.device).masked_fill(~assessed.to(logits.device), IGNORE_INDEX)
    total = F.cross_entropy(logits.float(), labels, ignore_index=IGNORE_INDEX, reduction="sum")
    return total / (labels != IGNORE_INDEX).sum().clamp(min=1)


def combine_losses(
    lm_loss: torch.Tensor | None,
    level_loss: torch.Tensor | None,
    category_loss: torch.Tensor | None,
    level_coef: float,
    category_coef: float,
) -> torch.Tensor | None:
    """LM loss + coefficients x safety losses; `None` if there is no part at all."""
    parts = [
        lm_loss,
        None if level_loss is None else level_coef * level_loss,
        None if category_loss is None else category_coef * category_loss,
    ]
    parts = [part for part in parts if part is not None]
    if not parts:
        return None
    return sum(part.to(parts[0].device) for part in parts[1:]) + parts[0]
