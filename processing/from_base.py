"""From a base model's processor to a SafeVLM's: `SafeVlmProcessor.from_base`.

Making a processor needs the package safevlm; using one does not. This file is not part of the code that a saved model
carries.
"""

import copy
import inspect

from transformers import AutoConfig, AutoImageProcessor, AutoTokenizer, ProcessorMixin
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING_NAMES

from .processing_safevlm import base_processor_class

# For families without a chat template: images, question, newline, answer (PaliGemma's prompt).
PREFIX_TEMPLATE = (
    "{% for m in messages %}{% for p in m['content'] if p['type'] == 'image' %}<image>{% endfor %}"
    "{% if loop.first %}{{ bos_token }}{% endif %}"
    "{% for p in m['content'] if p['type'] == 'text' %}{{ p['text'] }}{% endfor %}"
    "{% if m['role'] == 'assistant' %}{{ eos_token }}{% else %}\n{% endif %}{% endfor %}"
)
# Arguments of a base processor that SafeVlmProcessor stores itself; the others are its settings.
PARTS = ("image_processor", "tokenizer", "chat_template")


def from_base(cls, base, config=None, tokens_per_image: int | None = None, **kwargs):
    """
    Extends a base model's processor.

    Args:
        base (`str`, `Path` or `ProcessorMixin`): Hub id, folder or a loaded processor (which is not changed).
        config (`SafeVlmConfig`, *optional*): The model's configuration; sets `tokens_per_image`.
        tokens_per_image (`int`, *optional*): Used without `config`. The default, that of [`SafeVlmProcessor`], matches
            the default `SafeVlmConfig`.
        kwargs: Passed on when the base's processor is loaded.

    Returns:
        `SafeVlmProcessor`
    """
    if not isinstance(base, ProcessorMixin):
        base = load_base_processor(base, **kwargs)
    if not hasattr(base, "image_processor"):
        raise ValueError(
            f"The base's processor, a {type(base).__name__}, takes no images: `base` must be a vision-language model."
        )
    if config is not None:
        tokens_per_image = config.tokens_per_image
    name = type(base).__name__
    return cls(
        image_processor=copy.deepcopy(base.image_processor),  # saving writes the name of its code into it
        tokenizer=copy.deepcopy(base.tokenizer),
        base_processor_class=name,
        base_processor_kwargs=_settings(base_processor_class(name), vars(base)),
        chat_template=base.chat_template or getattr(base.tokenizer, "chat_template", None) or PREFIX_TEMPLATE,
        **({} if tokens_per_image is None else {"tokens_per_image": tokens_per_image}),
    )


def load_base_processor(path, **kwargs) -> ProcessorMixin:
    """
    Loads a base model's processor from its Hub id or folder.

    Like `AutoProcessor.from_pretrained`, but without a video processor and so without torchvision.
    """
    saved, _ = ProcessorMixin.get_processor_dict(path, **kwargs)
    name = saved.get("processor_class")
    if name is None:  # older repositories name only the model's type
        model_type = AutoConfig.from_pretrained(path, **kwargs).model_type
        name = PROCESSOR_MAPPING_NAMES.get(model_type)
        if name is None:
            raise ValueError(
                f"{str(path)!r} is a {model_type!r} model without images: it is not a vision-language model."
            )
    processor_class = base_processor_class(name)
    return processor_class(
        image_processor=AutoImageProcessor.from_pretrained(path, **kwargs),
        tokenizer=AutoTokenizer.from_pretrained(path, **kwargs),
        chat_template=saved.get("chat_template"),
        **_settings(processor_class, saved),
    )


def _settings(processor_class, values: dict) -> dict:
    """Those of `values` that are arguments of `processor_class`, without its parts."""
    names = inspect.signature(processor_class.__init__).parameters
    return {name: value for name, value in values.items() if name in names and name not in PARTS}
