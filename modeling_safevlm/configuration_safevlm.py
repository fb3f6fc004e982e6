"""Configuration of a SafeVLM: the base model's, nested, beside the sizes, labels and policy of the safety modules.

Every load of a model starts with this file, so it first checks the versions of what is installed.
"""

import re

from transformers.utils.versions import require_version

# Before 5.23, transformers answers wrongly, without an error, from images with chunked prefill and from caches of
# Qwen2.5-VL. 5.24 renames `past_key_values` to `cache`, which would bypass the check of what a cache holds.
# ".dev0" admits development builds of the lowest release, and excludes those of the first one that does not work.
REQUIRED = ("transformers>=5.23.dev0,<5.24.dev0", "torch>=2.6.dev0")


def check_installed():
    """Raises `ImportError` if an installed package is older or newer than this code can work with."""
    for requirement in REQUIRED:
        fix = requirement.replace(".dev0", "")
        require_version(requirement, f"This SafeVLM needs it: pip install --upgrade '{fix}' (and restart Python).")


# Before the imports below, which other releases may lack.
check_installed()

from transformers import AutoConfig, PreTrainedConfig  # noqa: E402
from transformers.models.auto.modeling_auto import (  # noqa: E402
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES,
)

from .safety_labels import SafetyLabels  # noqa: E402
from .safety_policy import SafetyPolicy  # noqa: E402

SAFEVLM_VERSION = "0.1.0"

# `transformers serve`, the pipelines and the model card look up in these tables whether a class is a vision-language
# model, and the Auto classes' `register` does not add it. Added here because a server reads the configuration first.
for names in (MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES, MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES):
    names["safevlm"] = "SafeVlmForConditionalGeneration"


class SafeVlmConfig(PreTrainedConfig):
    """
    Args:
        base_config (`PreTrainedConfig` or `dict`):
            Configuration of the vision-language model that is made safe.
        safety_hidden_size (`int`, *optional*):
            Width of projector, head and head tokens. `None` takes the language model's width, as in the paper.
        safety_projector_type (`str`, *optional*): `"c_abstractor"` (convolutions, as in the paper; needs the same
            square patch grid for every image) or `"resampler"` (learned queries; any number of patches). `None` takes
            the one that fits the base's family.
        num_safety_features (`int`): Safety features per image, the projector's output. For `"c_abstractor"` a square.
        safety_projector_depth (`int`): Convolution blocks before and after pooling, or attention layers.
        num_head_tokens (`int`): First set of safety tokens (paper section 3.2), read by the safety head.
        num_prompt_tokens (`int`): Second set of safety tokens, beside each image at the language model's input.
        num_projected_tokens (`int`): Safety-projected tokens at the same place, which show the safety features to
            the language model, too. The paper's code shows them to the head only.
        num_head_layers, num_attention_heads (`int`): Cross-attention layers of the safety head, and their heads.
        category_names, level_names, safe_category: See [`SafetyLabels`].
        safety_level_loss_coef, safety_category_loss_coef (`float`): Weights of the classification losses (paper: 10).
        safety_policy (`SafetyPolicy`, `dict` or preset name): The policy in force unless a call names another. Not a
            path: a downloaded model must not name files on this machine.
        safety_token_id (`int`): Token id of the `<safety>` placeholder.
        policy_token_ids (`dict[str, str]`): The policy's texts as token ids separated by spaces, so that the model
            writes hints and refusals without a tokenizer.
        generation_prompt_token_ids (`list[int]`): What the chat template writes between the newest question and the
            answer. Hints go before it.
        answer_opening_token_ids (`list[int]`): What a forced refusal begins with: the end of the thoughts that the
            generation prompt opens.
    """

    model_type = "safevlm"
    sub_configs = {"base_config": AutoConfig}
    # The Trainer takes every other output as a prediction: the head's logits.
    keys_to_ignore_at_inference = [
        *("lm_loss", "safety_level_loss", "safety_category_loss", "logits", "safety_assessed"),
        *("past_key_values", "hidden_states", "attentions"),
    ]

    base_config: dict | PreTrainedConfig | None = None
    safety_hidden_size: int | None = 1024
    safety_projector_type: str | None = None
    num_safety_features: int = 144
    safety_projector_depth: int = 2
    num_head_tokens: int = 16
    num_prompt_tokens: int = 4
    num_projected_tokens: int = 4
    num_head_layers: int = 1
    num_attention_heads: int = 8
    category_names: list[str] | tuple[str, ...] = SafetyLabels.category_names
    level_names: list[str] | tuple[str, ...] = SafetyLabels.level_names
    safe_category: str = SafetyLabels.safe_category
    safety_level_loss_coef: float = 10.0
    safety_category_loss_coef: float = 10.0
    safety_policy: SafetyPolicy | dict | str = "default"
    safety_token_id: int | None = None
    policy_token_ids: dict[str, str] | None = None
    generation_prompt_token_ids: list[int] | None = None
    answer_opening_token_ids: list[int] | None = None
    initializer_range: float = 0.02

    def __post_init__(self, safevlm_version: str | None = None, **kwargs):
        check_saved_by(safevlm_version)
        self.safevlm_version = SAFEVLM_VERSION
        for name in ("safety_projector_depth", "num_prompt_tokens", "num_projected_tokens", "num_head_tokens"):
            if getattr(self, name) < 0:
                raise ValueError(f"`{name}` must be 0 or more, got {getattr(self, name)}.")
        if self.safety_projector_type not in (None, "c_abstractor", "resampler"):
            raise ValueError(
                f"`safety_projector_type` must be 'c_abstractor' or 'resampler', got {self.safety_projector_type!r}."
            )
        self.safety_policy = SafetyPolicy.from_value(self.safety_policy, files=False).for_labels(self.labels).to_dict()
        # Copies, and lists where JSON has lists.
        self.category_names, self.level_names = list(self.category_names), list(self.level_names)
        self.policy_token_ids = dict(self.policy_token_ids or {})
        self.generation_prompt_token_ids = list(self.generation_prompt_token_ids or [])
        self.answer_opening_token_ids = list(self.answer_opening_token_ids or [])

        base_config, self.base_config = self.base_config, None
        if isinstance(base_config, dict):
            base_config = AutoConfig.for_model(**base_config)
        if base_config is not None:
            kwargs.setdefault("tie_word_embeddings", getattr(base_config, "tie_word_embeddings", False))
        super().__post_init__(**kwargs)
        # Only now: `super().__post_init__` would reset the attention implementation of a loaded base.
        self.base_config = base_config
        if kwargs.get("attn_implementation") is not None:
            self._attn_implementation = kwargs["attn_implementation"]
        # The pipeline of pipeline_safevlm.py adds the verdict to the stock one's answer.
        self.custom_pipelines = {
            "image-text-to-text": {
                "impl": "pipeline_safevlm.SafeVlmPipeline",
                "pt": ["AutoModelForImageTextToText"],
                "type": "multimodal",
            }
        }

    @classmethod
    def paper(cls, base_config=None, **kwargs) -> "SafeVlmConfig":
        """The paper's sizes: everything at the language model's width, two sets of 64 safety tokens."""
        sizes = dict(
            safety_hidden_size=None,
            safety_projector_depth=3,
            num_head_tokens=64,
            num_prompt_tokens=64,
            num_projected_tokens=16,
            safety_policy="paper",
        )
        return cls(base_config=base_config, **{**sizes, **kwargs})

    @property
    def tokens_per_image(self) -> int:
        """Number of `<safety>` placeholders beside each image."""
        return self.num_prompt_tokens + self.num_projected_tokens

    @property
    def labels(self) -> SafetyLabels:
        return SafetyLabels(self.category_names, self.level_names, self.safe_category)

    def get_text_config(self, decoder=None, encoder=None) -> PreTrainedConfig:
        if self.base_config is None:
            return self
        return self.base_config.get_text_config(decoder=decoder, encoder=encoder)


def check_saved_by(version: str | None):
    """
    Raises `ValueError` for a configuration that a later release of safevlm wrote. This release would ignore settings
    that it does not know, and the model might judge differently from how it was tested.
    """
    if version is not None and _release(version) > _release(SAFEVLM_VERSION):
        raise ValueError(
            f"This SafeVLM was saved by safevlm {version}, found {SAFEVLM_VERSION}: "
            f"pip install --upgrade 'safevlm>={version}' (and restart Python)."
        )


def _release(version: str) -> tuple[int, int]:
    """Major and minor number: `(0, 1)` for `"0.1.0.post1"`."""
    if (numbers := re.match(r"(\d+)\.(\d+)", str(version))) is None:
        raise ValueError(f"A version must start with two numbers, as {SAFEVLM_VERSION!r} does, got {version!r}.")
    return int(numbers[1]), int(numbers[2])
