"""What must hold for a loaded model: no weight is missing or damaged, and `generate` is the safe one."""

from torch import nn
from transformers.integrations.accelerate import load_offloaded_parameter


def check_loaded(model, source: str, loading_info: dict | None):
    """
    Raises `ValueError` for a model that would appear safe without being safe.

    Args:
        source (`str`): The folder or Hub id that the model was loaded from.
        loading_info (`dict`, *optional*): From `from_pretrained`. `None` permits missing weights.
    """
    if "generate" in vars(model):
        raise ValueError(
            f"{source!r} has a custom_generate/ folder, whose `generate` would replace the safe one: remove it."
        )
    if loading_info is not None:
        _check_complete(
            source, sorted(loading_info["missing_keys"]), sorted(loading_info.get("mismatched_keys") or [])
        )
    check_safety_weights(model.safety, source)


def _check_complete(source: str, missing: list[str], mismatched: list):
    if missing:
        num_safety = sum(name.startswith("safety.") for name in missing)
        names = ", ".join(missing[:3])
        problem = f"lacks {len(missing)} weights, {num_safety} of them safety weights ({names}, ...)"
    elif mismatched:
        problem = f"has weights of other sizes than its config says: {mismatched[:3]}"
    else:
        return
    raise ValueError(
        f"The checkpoint {source!r} {problem}. The model would appear safe, but its safety modules are untrained. To "
        f"add fresh safety modules to a base model, use `SafeVlmForConditionalGeneration.from_base` of the package "
        f"safevlm."
    )


def check_safety_weights(safety: nn.Module, source: str):
    """
    Raises `ValueError` if loaded safety weights are not finite or all zero: such a head would call nothing risky.
    Biases may be zero. Weights without values yet (a model on the meta device) are not checked.
    """
    for name, weight in safety.named_parameters():
        if weight.is_meta:
            try:
                weight = load_offloaded_parameter(safety, name)
            except ValueError:
                continue
        if not weight.isfinite().all():
            problem = "not finite"
        elif weight.numel() and not name.endswith("bias") and not weight.any():
            problem = "all zero"
        else:
            continue
        raise ValueError(
            f"The safety weights of {source!r} are damaged: {name} is {problem}. The model would appear safe, but its "
            f"safety modules do not work. Load an undamaged copy; if the weights overflow {weight.dtype}, load them "
            f"in another `dtype`."
        )
