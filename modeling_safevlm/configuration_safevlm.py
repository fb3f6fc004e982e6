"""Configuration of a SafeVLM: the base model's, nested, and every size and label of the safety modules."""

from .versions import SAFEVLM_VERSION, check_saved_by  # isort: split

from transformers import AutoConfig, PreTrainedConfig
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES,
)

from .safety_labels import SafetyLabels
from .safety_policy import SafetyPolicy

# `transformers serve`, the pipelines and the model card ask these tables whether a class is a vision-language model;
# the Auto classes' `register` does not enter it there. Here, since a server reads a model's configuration first.
for names in (MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES, MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES):
    names["safevlm"] = "SafeVlmForConditionalGeneration"


class SafeVlmConfig(PreTrainedConfig):
    """
    Args:
        base_config (`PreTrainedConfig` or `dict`):
            Configuration of the vision-language model that is made safe.
        safety_hidden_size (`int`, *optional*):
            Width of projector, head and the first set of safety tokens. `None` takes the language model's width (the
            paper's choice).
        safety_projector_type (`str`, *optional*): `"c_abstractor"` (convolutions, as in the paper; needs the same
            square patch grid for every image) or `"resampler"` (learned queries; any number of patches). `None` takes
            the one that fits the base's family.
        num_safety_features (`int`): Safety features per image, output of the projector. A square for `"c_abstractor"`.
        safety_projector_depth (`int`): Convolution blocks before and after pooling, or attention layers.
        num_head_tokens (`int`): First set of safety tokens (paper section 3.2), read by the safety head.
        num_prompt_tokens (`int`): Second set of safety tokens, put beside each image at the language model's input.
        num_projected_tokens (`int`): Safety-projected tokens put there, too. The paper's code feeds the safety
            features to the head only; with these the language model sees them.
        num_head_layers, num_attention_heads (`int`): Cross-attention layers of the safety head, and their heads.
        category_names, level_names (`list[str]`): Labels, in the order of their ids. `safe_category` is the one
            without risk; level 0 is "no risk".
        safety_level_loss_coef, safety_category_loss_coef (`float`): Weights of the classification losses (paper: 10).
        safety_policy (`SafetyPolicy`, `dict` or preset name): The policy in force unless a call names another. No
            path: a downloaded model must not name files here.
        safety_token_id (`int`): Token id of the `<safety>` placeholder.
        policy_token_ids (`dict[str, str]`): The policy's texts as token ids (space separated), made by `from_base`, so
            that the model can write hints and refusals without a tokenizer.
        generation_prompt_token_ids (`list[int]`): What the chat template writes after the newest question, up to the
            answer; hints go before it.
        answer_opening_token_ids (`list[int]`): What a forced refusal begins with: the end of the thoughts that the
            generation prompt opens.

    `safevlm_version` in a saved configuration is the release that wrote it; a later one's is refused.
    """

    model_type = "safevlm"
    sub_configs = {"base_config": AutoConfig}
    # The Trainer takes every other output as a prediction: the head's logits.
    keys_to_ignore_at_inference = [
        "lm_loss",
        "safety_level_loss",
        "safety_category_loss",
        "logits",
        "safety_assessed",
        "past_key_values",
        "hidden_states",
        "attentions",
    ]

    def __init__(
        self,
        base_config=None,
        safety_hidden_size: int | None = 1024,
        safety_projector_type: str | None = None,
        num_safety_features: int = 144,
        safety_projector_depth: int = 2,
        num_head_tokens: int = 16,
        num_prompt_tokens: int = 4,
        num_projected_tokens: int = 4,
        num_head_layers: int = 1,
        num_attention_heads: int = 8,
        category_names: list[str] = SafetyLabels.category_names,
        level_names: list[str] = SafetyLabels.level_names,
        safe_category: str = SafetyLabels.safe_category,
        safety_level_loss_coef: float = 10.0,
        safety_category_loss_coef: float = 10.0,
        safety_policy="default",
        safety_token_id: int | None = None,
        policy_token_ids: dict[str, str] | None = None,
        generation_prompt_token_ids: list[int] | None = None,
        answer_opening_token_ids: list[int] | None = None,
        initializer_range: float = 0.02,
        **kwargs,
    ):
        check_saved_by(kwargs.pop("safevlm_version", None))
        self.safevlm_version = SAFEVLM_VERSION
        self.safety_hidden_size = safety_hidden_size
        self.safety_projector_type = safety_projector_type
        self.num_safety_features = num_safety_features
        self.safety_projector_depth = safety_projector_depth
        self.num_head_tokens = num_head_tokens
        self.num_prompt_tokens = num_prompt_tokens
        self.num_projected_tokens = num_projected_tokens
        self.num_head_layers = num_head_layers
        self.num_attention_heads = num_attention_heads
        labels = SafetyLabels(category_names, level_names, safe_category)
        self.category_names = list(labels.category_names)
        self.level_names = list(labels.level_names)
        self.safe_category = labels.safe_category
        self.safety_level_loss_coef = safety_level_loss_coef
        self.safety_category_loss_coef = safety_category_loss_coef
        self.safety_policy = SafetyPolicy.from_value(safety_policy, files=False).to_dict()
        self.safety_token_id = safety_token_id
        self.policy_token_ids = dict(policy_token_ids or {})
        self.generation_prompt_token_ids = list(generation_prompt_token_ids or [])
        self.answer_opening_token_ids = list(answer_opening_token_ids or [])
        self.initializer_range = initializer_range
        # The wrapper's pipeline adds the verdict to the stock answer; see pipeline_safevlm.py.
        self.custom_pipelines = {
            "image-text-to-text": {
                "impl": "pipeline_safevlm.SafeVlmPipeline",
                "pt": ["AutoModelForImageTextToText"],
                "type": "multimodal",
            }
        }
        kwargs.pop("custom_pipelines", None)
        if isinstance(base_config, dict):
            base_config = AutoConfig.for_model(**base_config)
        if base_config is not None:
            kwargs.setdefault("tie_word_embeddings", getattr(base_config, "tie_word_embeddings", False))
        attention = kwargs.get("attn_implementation")
        self.base_config = None
        super().__init__(**kwargs)
        # After `super().__init__`, which would reset a loaded base's attention implementation.
        self.base_config = base_config
        if attention is not None:
            self._attn_implementation = attention
        self._check()

    def _check(self):
        for name in ("safety_projector_depth", "num_prompt_tokens", "num_projected_tokens", "num_head_tokens"):
            if getattr(self, name) < 0:
                raise ValueError(f"`{name}` must be 0 or more, got {getattr(self, name)}.")
        if self.safety_projector_type not in (None, "c_abstractor", "resampler"):
            raise ValueError(
                f"`safety_projector_type` must be 'c_abstractor' or 'resampler', got {self.safety_projector_type!r}."
            )
        policy = SafetyPolicy.from_value(self.safety_policy, files=False)
        self.safety_policy = policy.for_labels(self.labels).to_dict()

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
        """`<safety>` placeholders beside each image."""
        return self.num_prompt_tokens + self.num_projected_tokens

    @property
    def labels(self) -> SafetyLabels:
        """The names of categories and levels, and which category is the safe one."""
        return SafetyLabels(self.category_names, self.level_names, self.safe_category)

    def get_text_config(self, decoder=None, encoder=None) -> PreTrainedConfig:
        if self.base_config is None:
            return self
        return self.base_config.get_text_config(decoder=decoder, encoder=encoder)
