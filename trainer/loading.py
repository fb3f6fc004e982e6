"""One way to load a model to ask: a SafeVLM or any other vision-language model, and its processor."""

from __future__ import annotations

import torch
from transformers import AutoConfig, AutoModelForImageTextToText, BitsAndBytesConfig

from safevlm import SafeVlmConfig, SafeVlmForConditionalGeneration, SafeVlmProcessor

QUANTIZATIONS = {
    "bnb-4bit": dict(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True),
    "bnb-8bit": dict(load_in_8bit=True),
}


def load_checkpoint(
    checkpoint: str,
    device: str | None = None,
    dtype: str = "auto",
    revision: str | None = None,
    quantization: str | None = None,
):
    """
    A SafeVLM or any other vision-language model, in evaluation mode, and its processor.

    A base gets a [`SafeVlmProcessor`] without safety placeholders: user text is neutralised and pictures are read in
    the same way for every model.

    Args:
        checkpoint (`str`): Folder or Hub id.
        device (`str`, *optional*): Such as `"cpu"` or `"cuda:1"`; `"auto"` spreads the model over the accelerators.
            By default the first GPU, or the CPU if there is none.
        dtype (`str`): Of the weights, such as `"bfloat16"`; `"auto"` keeps the checkpoint's.
        revision (`str`, *optional*): Branch, tag or commit of a Hub id.
        quantization (`str`, *optional*): `"bnb-4bit"` or `"bnb-8bit"`.

    Raises:
        `ValueError`: The dtype does not exist, or a SafeVLM does not fit its processor or its policy's texts.
    """
    if dtype != "auto" and not isinstance(getattr(torch, dtype, None), torch.dtype):
        raise ValueError(f"`dtype` must be 'auto', 'float32', 'bfloat16' or another dtype of torch, got {dtype!r}.")
    options = {"revision": revision, "dtype": dtype, "device_map": device or default_device()}
    if quantization is not None:
        options["quantization_config"] = BitsAndBytesConfig(**QUANTIZATIONS[quantization])
    if AutoConfig.from_pretrained(checkpoint, revision=revision).model_type == SafeVlmConfig.model_type:
        processor = SafeVlmProcessor.from_pretrained(checkpoint, revision=revision)
        model = SafeVlmForConditionalGeneration.from_pretrained(checkpoint, **options)
        model.check_policy_texts(processor)
    else:
        processor = SafeVlmProcessor.from_base(checkpoint, tokens_per_image=0, revision=revision)
        model = AutoModelForImageTextToText.from_pretrained(checkpoint, **options)
    return model.eval(), processor


def default_device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"
