"""The base model's own processor class, with the three changes that SafeVLM needs.

- Each image's tokens are followed by `<safety>` placeholders.
- No video processor: the safety head does not see videos, so none may pass. (It would also need torchvision.)
- PaliGemma's moves texts about in the prompt by itself; here prompts come fully rendered (see `PREFIX_TEMPLATE`).
"""

import inspect

import transformers
from transformers import AutoConfig, AutoImageProcessor, AutoTokenizer, ProcessorMixin
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING_NAMES

# For families without a chat template: images, question, newline, answer (PaliGemma's prompt).
PREFIX_TEMPLATE = (
    "{% for m in messages %}{% for p in m['content'] if p['type'] == 'image' %}<image>{% endfor %}"
    "{% if loop.first %}{{ bos_token }}{% endif %}"
    "{% for p in m['content'] if p['type'] == 'text' %}{{ p['text'] }}{% endfor %}"
    "{% if m['role'] == 'assistant' %}{{ eos_token }}{% else %}\n{% endif %}{% endfor %}"
)
PARTS = ("image_processor", "tokenizer", "video_processor", "chat_template")
REQUIRED = "5.23"

# As in versions.py, for those who load the processor first.
if tuple(map(int, transformers.__version__.split(".")[:2])) < tuple(map(int, REQUIRED.split("."))):
    raise ImportError(
        f"This SafeVLM's processor needs transformers >= {REQUIRED}, found {transformers.__version__}: "
        f"pip install --upgrade 'transformers>={REQUIRED}' (and restart Python)."
    )


def base_processor_class(name: str, placeholders: str = "") -> type[ProcessorMixin]:
    """
    transformers' processor class `name`, changed as above.

    Args:
        placeholders (`str`): What follows each image's tokens.
    """
    original = getattr(transformers, name, None)
    if not isinstance(original, type) or not issubclass(original, ProcessorMixin):
        raise ValueError(
            f"`base_processor_class` {name!r} is no processor of transformers {transformers.__version__}."
        )

    class BaseProcessor(original):
        def __init__(self, image_processor=None, tokenizer=None, **settings):
            if "video_processor" in inspect.signature(original.__init__).parameters:
                settings["video_processor"] = None
            super().__init__(image_processor=image_processor, tokenizer=tokenizer, **settings)

        # What is saved follows from these two.
        __init__.__signature__ = inspect.signature(original.__init__)

        @classmethod
        def get_attributes(cls) -> list[str]:
            return [name for name in super().get_attributes() if name != "video_processor"]

        def replace_image_token(self, *args, **kwargs) -> str:
            return super().replace_image_token(*args, **kwargs) + placeholders

    if name == "PaliGemmaProcessor":
        BaseProcessor.prepare_inputs_layout = ProcessorMixin.prepare_inputs_layout
        BaseProcessor.validate_inputs = ProcessorMixin.validate_inputs
    # For errors and `to_dict`, it is the base's.
    BaseProcessor.__name__ = BaseProcessor.__qualname__ = name
    return BaseProcessor


def base_processor_settings(name: str, values: dict) -> dict:
    """Of `values` what the `__init__` of transformers' processor class `name` takes, its parts aside."""
    fields = inspect.signature(getattr(transformers, name).__init__).parameters
    return {field: value for field, value in values.items() if field in fields and field not in PARTS}


def load_base_processor(path, **kwargs) -> ProcessorMixin:
    """
    The processor of a base model, from its Hub id or folder.

    As `AutoProcessor.from_pretrained`, but without a video processor and hence without torchvision.
    """
    settings, _ = ProcessorMixin.get_processor_dict(path, **kwargs)
    name = settings.get("processor_class")
    if name is None:  # older repositories say it with the model's type only
        model_type = AutoConfig.from_pretrained(path, **kwargs).model_type
        name = PROCESSOR_MAPPING_NAMES.get(model_type)
        if name is None:
            raise ValueError(
                f"{str(path)!r} is a {model_type!r} model without images: it is not a vision-language model."
            )
    return base_processor_class(name)(
        image_processor=AutoImageProcessor.from_pretrained(path, **kwargs),
        tokenizer=AutoTokenizer.from_pretrained(path, **kwargs),
        chat_template=settings.get("chat_template"),
        **base_processor_settings(name, settings),
    )
