"""SafeVLM (arXiv 2405.13581): a vision-language model wrapped with safety projector, safety tokens and safety head.

Composition, not inheritance: `model.base` is any supported `AutoModelForImageTextToText`, untouched. The data flows

    image -> `encode_images` -> `predict_safety` -> `apply_policy` -> `condition` -> the base model

both in `forward` (training: conditioned on labels or predictions) and in `generate` (see generation_safevlm.py). The
vision tower runs once; the head runs before the language model and reads the question's token embeddings.
"""

from dataclasses import dataclass

import torch
from torch import nn
from transformers import AutoModelForImageTextToText, PreTrainedModel
from transformers.processing_utils import Unpack
from transformers.utils import ModelOutput, TransformersKwargs, can_return_tuple, logging

from .backbones import VisionFeatures, get_backbone, patches_of_images, units_of_images
from .configuration_safevlm import SafeVlmConfig
from .devices import compute_device
from .embedding_override import override_embeddings
from .generation_safevlm import SafeVlmGenerationMixin
from .losses import IGNORE_INDEX, combine_losses, safety_losses
from .policy_texts import store_policy_texts
from .prompt import check_inputs
from .quantization import forget_quantization, keep_safety_modules, share_quantization, unpack
from .safety_modules import SafetyEmbeddings, SafetyModules, SafetyTokens, check_safety_weights
from .safety_policy import POLICY_PRESETS, SafetyPolicy
from .safety_verdict import SafetyVerdict, assess_rows, worst_images

logger = logging.get_logger(__name__)


@dataclass
class SafeVlmOutput(ModelOutput):
    """
    Args:
        loss (`torch.FloatTensor` of shape `(1,)`, *optional*): LM loss + coefficients x safety losses.
        lm_loss, safety_level_loss, safety_category_loss (`torch.FloatTensor` of shape `(1,)`, *optional*): Its parts.
        logits (`torch.FloatTensor` of shape `(batch_size, sequence_length, vocab_size)`)
        safety_level_logits (`torch.FloatTensor` of shape `(batch_size, num_levels)`): Each row's worst image's logits;
            0 for rows without an image (see `safety_assessed`). `None` where no images were passed.
        safety_category_logits (`torch.FloatTensor` of shape `(batch_size, num_categories)`): Likewise.
        safety_assessed (`torch.BoolTensor` of shape `(batch_size,)`)
        past_key_values, hidden_states, attentions: As the base model returns them.
    """

    loss: torch.FloatTensor | None = None
    lm_loss: torch.FloatTensor | None = None
    safety_level_loss: torch.FloatTensor | None = None
    safety_category_loss: torch.FloatTensor | None = None
    logits: torch.FloatTensor | None = None
    safety_level_logits: torch.FloatTensor | None = None
    safety_category_logits: torch.FloatTensor | None = None
    safety_assessed: torch.BoolTensor | None = None
    past_key_values: object | None = None
    hidden_states: tuple[torch.FloatTensor] | None = None
    attentions: tuple[torch.FloatTensor] | None = None


@dataclass
class ImageFeatures:
    """
    Args:
        vision (`VisionFeatures`): The base's own features.
        safety (`torch.FloatTensor` of shape `(num_images, num_safety_features, safety_hidden_size)`)
        rows (`torch.LongTensor` of shape `(num_images,)`): The row of the batch each image belongs to.
    """

    vision: VisionFeatures
    safety: torch.Tensor
    rows: torch.Tensor


@dataclass
class HeadReading:
    """
    What the safety head says about a batch in one reading of its prompts, image by image.

    Args:
        level_logits (`torch.FloatTensor` of shape `(num_images, num_levels)`)
        category_logits (`torch.FloatTensor` of shape `(num_images, num_categories)`)
        rows (`torch.LongTensor` of shape `(num_images,)`): The row of the batch each image belongs to.
        batch_size (`int`)
    """

    level_logits: torch.Tensor
    category_logits: torch.Tensor
    rows: torch.Tensor
    batch_size: int

    def per_row(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """
        Level and category logits of each row's worst image, 0 where there is none, and a `torch.BoolTensor` of shape
        `(batch_size,)` that says where there is one.
        """
        worst = worst_images(self.level_logits, self.rows, self.batch_size)
        level_logits, category_logits = (
            nn.functional.pad(logits, (0, 0, 0, 1))[worst] for logits in (self.level_logits, self.category_logits)
        )
        return level_logits, category_logits, worst >= 0


class SafeVlmPreTrainedModel(PreTrainedModel):
    config_class = SafeVlmConfig
    base_model_prefix = "base"
    main_input_name = "input_ids"
    input_modalities = ("image", "text")
    supports_gradient_checkpointing = True
    _skip_keys_device_placement = ["past_key_values"]
    # Beside the base's own. `device_map="auto"` keeps each on one device; FSDP shards each as a unit of its own.
    _no_split_modules = ["CAbstractor", "Resampler", "SafetyHead", "SafetyEmbeddings"]
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True

    @torch.no_grad()
    def _init_weights(self, module):
        # The base model's own modules are initialised by its own `_init_weights`.
        std = self.config.initializer_range
        if isinstance(module, SafetyTokens):
            nn.init.normal_(module.weight, std=module.initializer_range)
        elif isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=std)
        elif isinstance(module, (nn.Linear, nn.Conv2d)):
            # Keeps the variance through the modules' depth whatever their width (0.02 is tuned to wide models only).
            nn.init.xavier_uniform_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, (nn.LayerNorm, nn.GroupNorm)):
            nn.init.ones_(module.weight)
            nn.init.zeros_(module.bias)


class SafeVlmForConditionalGeneration(SafeVlmPreTrainedModel, SafeVlmGenerationMixin):
    """
    A safe vision-language model. Load a trained one with `from_pretrained`. The package safevlm makes one of a base
    (from_base.py; not part of the code that a saved model carries):

    ```python
    processor = SafeVlmProcessor.from_base("llava-hf/llava-1.5-7b-hf")
    model = SafeVlmForConditionalGeneration.from_base("llava-hf/llava-1.5-7b-hf", processor)
    ```
    """

    def __init__(self, config: SafeVlmConfig, base: PreTrainedModel | None = None):
        if config.base_config is None:
            raise ValueError(
                "The configuration has no `base_config`, so it is not a SafeVLM's. To make a base model safe, use "
                "`SafeVlmForConditionalGeneration.from_base` of the package safevlm."
            )
        # Whoever ties or unties the wrapper's embeddings means the base's; there are no others.
        config.base_config.tie_word_embeddings = config.tie_word_embeddings
        super().__init__(config)
        self.backbone = get_backbone(config.base_config)
        if config.safety_projector_type is None:
            config.safety_projector_type = self.backbone.projector_type
        self.base = AutoModelForImageTextToText.from_config(config.base_config) if base is None else base
        self.safety = SafetyModules(config, self.backbone.vision_hidden_size)
        self.post_init()
        # FSDP refuses names of classes that the model does not have; some vision towers declare such.
        self._no_split_modules = {type(module).__name__ for module in self.modules()} & set(self._no_split_modules)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *args, output_loading_info=False, **kwargs):
        """
        As `PreTrainedModel.from_pretrained`, but a checkpoint that lacks weights is an error (with
        `output_loading_info=True` the caller gets the list instead), and a `quantization_config` never quantises the
        safety modules.
        """
        if kwargs.get("quantization_config") is not None:
            kwargs["quantization_config"] = keep_safety_modules(kwargs["quantization_config"])
        model, info = super().from_pretrained(pretrained_model_name_or_path, *args, output_loading_info=True, **kwargs)
        share_quantization(model)
        model.check_policy_texts()
        if "generate" in vars(model):
            raise ValueError(
                f"{str(pretrained_model_name_or_path)!r} has a custom_generate/ folder, whose `generate` would answer "
                f"instead of the safe one: remove the folder."
            )
        missing, mismatched = sorted(info["missing_keys"]), sorted(info.get("mismatched_keys") or [])
        if (missing or mismatched) and not output_loading_info:
            safety = sum(name.startswith("safety.") for name in missing)
            what = f"lacks {len(missing)} weights, {safety} of them safety weights ({', '.join(missing[:3])}, ...)"
            if not missing:
                what = f"holds weights of other sizes than its config says: {mismatched[:3]}"
            raise ValueError(
                f"The checkpoint {str(pretrained_model_name_or_path)!r} {what}; a model with random safety modules "
                f"would look safe and not be it. To add fresh safety modules to a base model, use "
                f"`SafeVlmForConditionalGeneration.from_base` of the package safevlm."
            )
        check_safety_weights(model.safety, str(pretrained_model_name_or_path))
        if found := model.policy_weaknesses():
            name = str(pretrained_model_name_or_path)
            logger.warning_once(f"The policy saved with {name!r} is weak: {'; '.join(found)}.")
        return (model, info) if output_loading_info else model

    def save_pretrained(self, save_directory, *args, **kwargs):
        """As `PreTrainedModel.save_pretrained`; what is saved loads through all its Auto classes."""
        if hasattr(self, "peft_config"):
            raise ValueError(
                "The model has PEFT's layers in it, as in the middle of a training or where one was interrupted, and "
                "would not load again. Save it with `trainer.save_model(folder)`, which merges them, or go on with "
                "`trainer.train(resume_from_checkpoint=True)`."
            )
        if self._auto_class is not None:
            # transformers notes one Auto class per model; this one loads through three.
            auto_map = getattr(self.config, "auto_map", None) or {}
            for auto_class in ("AutoModel", "AutoModelForMultimodalLM"):
                auto_map = {**auto_map, auto_class: "modeling_safevlm.SafeVlmForConditionalGeneration"}
            self.config.auto_map = auto_map
            # transformers saves the files that this one imports: the pipeline's, too.
            from .pipeline_safevlm import SafeVlmPipeline  # noqa: F401
        super().save_pretrained(save_directory, *args, **kwargs)

    # -- the policy --------------------------------------------------------------------------------------------------

    def set_safety_policy(self, policy, processor=None):
        """
        Makes `policy` the model's own (it is saved with the model).

        Args:
            policy (`SafetyPolicy`, `dict`, file or preset name)
            processor (*optional*): Needed when the policy brings texts that the model has no token ids for.

        Raises:
            `ValueError`: The policy does not fit the model's labels, or a text of it has no tokens that say it.
        """
        policy = SafetyPolicy.from_value(policy).for_labels(self.config.labels)
        if processor is not None:
            store_policy_texts(self.config, policy, processor, self._control_token_ids())
        self.config.safety_policy = policy.to_dict()

    def resolve_policy(self, policy=None) -> SafetyPolicy:
        """
        The policy a call asks for, or the model's own. A preset's name means the preset, whatever the model's own
        policy is called or says; only the head's calibration (the temperatures, which have bounds) is the model's.
        """
        own = SafetyPolicy.from_value(self.config.safety_policy, files=False)
        if isinstance(policy, str) and policy in POLICY_PRESETS:
            policy = POLICY_PRESETS[policy].replace(
                level_temperature=own.level_temperature, category_temperature=own.category_temperature
            )
        policy = own if policy is None else SafetyPolicy.from_value(policy)
        return policy.for_labels(self.config.labels)

    def policy_weaknesses(self) -> list[str]:
        """In which ways the model's own policy is milder than the preset `"default"`; see `SafetyPolicy`."""
        return self.resolve_policy().weaknesses(self.config.labels)

    # -- the safety path ---------------------------------------------------------------------------------------------

    def encode_images(self, input_ids: torch.Tensor, **image_inputs) -> ImageFeatures | None:
        """
        Vision features and safety features of a batch's images; `None` if it has no images.

        Args:
            input_ids (`torch.LongTensor` of shape `(batch_size, sequence_length)`)
            image_inputs: The processor's image tensors, `pixel_values` and what else the family has.
        """
        image_inputs = {name: value for name, value in image_inputs.items() if name in self.backbone.image_inputs}
        image_tokens = (input_ids == self.backbone.image_token_id).sum(dim=1).tolist()
        if image_inputs.get("pixel_values") is None:
            if any(image_tokens):
                raise ValueError(
                    f"`input_ids` has {sum(image_tokens)} image tokens, but `pixel_values` is missing: pass all that "
                    f"the processor returned."
                )
            return None
        vision = self.backbone.encode(self.base, **image_inputs)
        rows, units = units_of_images(
            input_ids,
            self.backbone.image_token_id,
            self.config.safety_token_id,
            self.config.tokens_per_image,
            vision.tokens,
        )
        patches, mask = patches_of_images(vision.patches, units)
        projector = self.safety.projector
        device, dtype = compute_device(projector), next(projector.parameters()).dtype
        safety = projector(patches.to(device, dtype), None if mask is None else mask.to(device))
        return ImageFeatures(vision, safety, torch.tensor(rows, device=safety.device))

    def predict_safety(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None,
        features: ImageFeatures | None,
        question_mask: torch.Tensor | None = None,
    ) -> HeadReading:
        """
        The safety head's logits for each image, read with the question of its row.

        Args:
            question_mask (`torch.BoolTensor` of shape `(batch_size, sequence_length)`, *optional*): What the head may
                read; by default every token but padding. Answers must be left out.
        """
        head, batch_size = self.safety.head, len(input_ids)
        device, dtype = compute_device(head), next(head.parameters()).dtype
        if features is None:
            none = torch.zeros(0, dtype=torch.long, device=device)
            names = (self.config.level_names, self.config.category_names)
            logits = (torch.zeros(0, len(labels), device=device, dtype=dtype) for labels in names)
            return HeadReading(*logits, none, batch_size)
        if question_mask is None:
            question_mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        placeholders = [self.backbone.image_token_id, self.config.safety_token_id]
        for token_id in (i for i in placeholders if i is not None):
            question_mask = question_mask.bool() & (input_ids != token_id)
        embedding = self.base.get_input_embeddings()
        text = embedding(input_ids.to(compute_device(embedding))).to(device, dtype)  # (batch, length, text hidden)
        rows = features.rows.to(device)
        logits = head(text[rows], question_mask.to(device)[rows], features.safety.to(device))
        return HeadReading(*logits, rows, batch_size)

    def apply_policy(self, readings: list[HeadReading], policy: SafetyPolicy) -> SafetyVerdict:
        """The verdict on each row under `policy`: the strictest over its images and all readings."""
        return assess_rows(
            torch.cat([reading.level_logits for reading in readings]),
            torch.cat([reading.category_logits for reading in readings]),
            torch.cat([reading.rows for reading in readings]),
            readings[0].batch_size,
            policy,
            self.config.labels,
        )

    def condition(self, features: ImageFeatures, action: torch.Tensor, category: torch.Tensor) -> torch.Tensor:
        """
        Safety embeddings for all placeholders, conditioned on each row's action and category.

        Args:
            action, category (`torch.LongTensor` of shape `(batch_size,)`)

        Returns:
            `torch.FloatTensor` of shape `(num_images * tokens_per_image, text_hidden_size)`
        """
        embeddings: SafetyEmbeddings | None = self.safety.embeddings
        if embeddings is None:
            return features.safety.new_zeros(0, self.config.get_text_config().hidden_size)
        category = torch.where(action == 0, self.config.labels.safe_category_id, category)
        device = compute_device(embeddings)
        rows = features.rows.to(device)
        return embeddings(features.safety.to(device), action.to(device)[rows], category.to(device)[rows]).flatten(0, 1)

    # -- training ----------------------------------------------------------------------------------------------------

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        pixel_values: torch.FloatTensor | None = None,
        labels: torch.LongTensor | None = None,
        safety_level_labels: torch.LongTensor | None = None,
        safety_category_labels: torch.LongTensor | None = None,
        safety_question_mask: torch.Tensor | None = None,
        condition_on_labels: torch.BoolTensor | None = None,
        past_key_values=None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> SafeVlmOutput:
        """
        One pass, for training and for measuring. It carries out no policy: a decoding loop written around it is not
        guarded, `generate` is.

        Args:
            input_ids (`torch.LongTensor` of shape `(batch_size, sequence_length)`): With `<safety>` placeholders.
            labels (`torch.LongTensor` of shape `(batch_size, sequence_length)`): Token ids of answers, -100 elsewhere.
                A batch without any answer has no LM loss.
            safety_level_labels, safety_category_labels (`torch.LongTensor` of shape `(batch_size,)`): -100 is ignored.
            safety_question_mask (`torch.Tensor` of shape `(batch_size, sequence_length)`): See `predict_safety`; by
                default all tokens that `labels` does not supervise.
            condition_on_labels (`torch.BoolTensor` of shape `(batch_size,)`, *optional*): Rows whose safety embeddings
                are conditioned on their labels; all others, and rows without labels, on the head's prediction.
            kwargs: For the base model (further image inputs, `num_items_in_batch`, ...).
        """
        check_inputs(input_ids, self.backbone.pixel_ndims, pixel_values, **kwargs)
        features = self.encode_images(input_ids, pixel_values=pixel_values, **kwargs)
        if safety_question_mask is None and labels is not None:
            seen = torch.ones_like(input_ids) if attention_mask is None else attention_mask
            safety_question_mask = seen.bool() & (labels == IGNORE_INDEX)
        reading = self.predict_safety(input_ids, attention_mask, features, safety_question_mask)

        answered = labels is not None and bool((labels[:, 1:] != IGNORE_INDEX).any())  # else the loss would be 0 / 0
        base_inputs = dict(
            input_ids=input_ids,
            attention_mask=attention_mask,
            labels=labels if answered else None,
            past_key_values=past_key_values,
            **kwargs,
        )
        if labels is not None:
            base_inputs.update(self.backbone.training_inputs(labels))
        base_inputs["return_dict"] = True
        if features is None:
            output = self.base(**base_inputs)
        else:
            action, category = self._training_condition(
                reading, safety_level_labels, safety_category_labels, condition_on_labels
            )
            base_inputs["mm_encoder_outputs"] = features.vision.mm_encoder_outputs
            embeddings = self.condition(features, action, category)
            start = 0 if past_key_values is None else int(past_key_values.get_seq_length())
            with override_embeddings(self.base, embeddings, input_ids, self.config.safety_token_id, start=start):
                output = self.base(**base_inputs)

        level_logits, category_logits, assessed = reading.per_row()
        losses = safety_losses(level_logits, category_logits, safety_level_labels, safety_category_labels, assessed)
        lm_loss = output.loss if answered else None
        return SafeVlmOutput(
            loss=combine_losses(
                lm_loss,
                losses["safety_level_loss"],
                losses["safety_category_loss"],
                self.config.safety_level_loss_coef,
                self.config.safety_category_loss_coef,
            ),
            lm_loss=lm_loss,
            **losses,
            logits=output.logits,
            safety_level_logits=None if features is None else level_logits,
            safety_category_logits=None if features is None else category_logits,
            safety_assessed=None if features is None else assessed,
            past_key_values=output.get("past_key_values"),
            hidden_states=output.get("hidden_states"),
            attentions=output.get("attentions"),
        )

    def _training_condition(self, reading, level_labels, category_labels, condition_on_labels):
        """Action and category ids per row: the labels' where `condition_on_labels` is set, else the prediction's."""
        policy = self.resolve_policy()
        if not policy.enabled:  # a model saved with policy "off" can still be trained
            policy = self.resolve_policy("default")
        verdict = self.apply_policy([reading], policy)
        action, category = verdict.action, verdict.category
        if condition_on_labels is not None and level_labels is not None and category_labels is not None:
            level_labels, category_labels = level_labels.to(action.device), category_labels.to(action.device)
            use_label = (level_labels != IGNORE_INDEX) & (category_labels != IGNORE_INDEX)
            use_label &= condition_on_labels.to(action.device)
            table = policy.action_table(self.config.labels).to(action.device)
            labelled = table[category_labels.clamp(min=0), level_labels.clamp(min=0)]
            action = torch.where(use_label, labelled, action)
            category = torch.where(use_label, category_labels, category)
        return action, category

    # -- what transformers asks of a model ---------------------------------------------------------------------------

    @property
    def generation_config(self):
        """The base model's, since the base generates."""
        return self.base.generation_config

    @generation_config.setter
    def generation_config(self, value):
        # transformers sets one made from the wrapper's config before there is a base; the base makes its own.
        if "base" in self._modules:
            self.base.generation_config = value

    def train(self, mode: bool = True):
        if mode:
            unpack(self)
        return super().train(mode)

    def dequantize(self, dtype=None):
        unpack(self)
        model = super().dequantize(dtype or self.dtype)
        forget_quantization(model)
        return model

    def get_output_embeddings(self):
        return self.base.get_output_embeddings()

    def set_output_embeddings(self, value):
        self.base.set_output_embeddings(value)

    def resize_token_embeddings(self, *args, **kwargs):
        embeddings = self.base.resize_token_embeddings(*args, **kwargs)
        self.config.base_config = self.base.config
        self.vocab_size = self.base.vocab_size
        return embeddings
