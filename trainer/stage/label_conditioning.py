"""Which rows of a batch are conditioned on their labels instead of on the head's prediction.

The language model sees correct verdicts first, then more and more of the head's own, as at inference.
"""

import torch


def label_conditioning_share(args, step: int, max_steps: int) -> float:
    """
    Share of rows to condition on their labels, in [0, 1]: linear from `label_conditioning_start` to
    `label_conditioning_end` over the stage.

    Args:
        args (`SafeVlmTrainingArguments`)
    """
    start, end = args.label_conditioning_start, args.label_conditioning_end
    return start + (end - start) * min(step / max(max_steps, 1), 1.0)


def draw_rows(inputs: dict[str, torch.Tensor], share: float) -> torch.Tensor | None:
    """
    Draws a random `share` of a batch's rows, as `condition_on_labels` of the model's `forward`.

    Returns:
        `torch.BoolTensor` of shape `(batch_size,)`, or `None` if the batch has no labels or no image to condition.
    """
    needed = ("safety_level_labels", "safety_category_labels", "pixel_values")
    if share <= 0 or any(inputs.get(name) is None for name in needed):
        return None
    return torch.rand(len(inputs["input_ids"]), device=inputs["input_ids"].device) < share
