"""Loads the model that is served, and puts it under its policy."""

import torch
from transformers import BitsAndBytesConfig, logging

from safevlm import SafeVlmForConditionalGeneration, SafeVlmProcessor

QUANTIZATIONS = {
    "bnb-4bit": dict(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True),
    "bnb-8bit": dict(load_in_8bit=True),
}


def load(
    name: str,
    revision: str | None = None,
    policy=None,
    device: str = "auto",
    dtype: str = "auto",
    quantization: str | None = None,
):
    """
    A SafeVLM and its processor.

    Args:
        policy (`SafetyPolicy`, preset name or file, *optional*): Made the model's own, with the model's calibration.
        device (`str`): `"auto"` spreads the model over the accelerators there are.
        dtype (`str`): `"auto"` is as saved.
        quantization (`str`, *optional*): `"bnb-4bit"` or `"bnb-8bit"`.
    """
    if dtype != "auto" and not isinstance(getattr(torch, dtype, None), torch.dtype):
        raise ValueError(f"--dtype must be auto, float32, bfloat16 or another type of torch, got {dtype!r}.")
    logging.disable_progress_bar()
    options = {"revision": revision, "dtype": dtype, "device_map": device}
    if quantization is not None:
        options["quantization_config"] = BitsAndBytesConfig(**QUANTIZATIONS[quantization])
    processor = SafeVlmProcessor.from_pretrained(name, revision=revision)
    model = SafeVlmForConditionalGeneration.from_pretrained(name, **options).eval()
    model.check_policy_texts(processor)
    if policy is not None:
        model.set_safety_policy(model.resolve_policy(policy), processor)
    return model, processor
