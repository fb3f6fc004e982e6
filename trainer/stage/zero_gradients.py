"""A gradient of zero for batches that reach no trainable weight, such as one without a picture in stage 1.

Without it `backward` fails, and under DDP the other processes wait forever.
"""

from contextlib import contextmanager

import torch


@contextmanager
def zero_gradients(model):
    """
    Gives each training batch whose losses have no gradient one of zero, for every trainable weight.

    This is a forward hook because DDP looks for the weights in what its `forward` returns.

    Args:
        model (`SafeVlmForConditionalGeneration`): The plain model, inside whatever wraps it.
    """
    hook = model.register_forward_hook(_attach_weights)
    try:
        yield
    finally:
        hook.remove()


def _attach_weights(model, _args, output):
    names = ("loss", "lm_loss", "safety_level_loss", "safety_category_loss")
    present = [name for name in names if output.get(name) is not None]
    if not (model.training and torch.is_grad_enabled()) or any(output[name].requires_grad for name in present):
        return
    zero = sum((weight * 0).sum().cpu() for weight in model.parameters() if weight.requires_grad)
    for name in present:
        if name != "lm_loss":
            output[name] = output[name] + zero
