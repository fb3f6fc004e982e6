"""SafeVLM (arXiv 2405.13581): a vision-language model wrapped with safety projector, safety tokens and safety head.

Composition, not inheritance: `model.base` is any supported `AutoModelForImageTextToText`, untouched. The data flows

    image -> `encode_images` -> `predict_safety` -> `apply_policy` -> `condition` -> the base model

in `forward` (training: conditioned on labels or predictions) and in `generate` (see generation_safevlm.py). The vision
tower runs once; the head runs before the language model and reads the embeddings of the question's tokens.
"""

from dataclasses import dataclass

import torch
from torch import nn
from transformers import AutoModelForImageTextToText, PreTrainedModel
from transformers.processing_utils import Unpack
from transformers.utils import ModelOutput, TransformersKwargs, can_return_tuple, logging

from .backbones import ImageFeatures, compute_device, get_backbone, patches_of_images, units_of_images
from .configuration_safevlm import SafeVlmConfig
from .embedding_override import override_embeddings
from .generation_safevlm import SafeVlmGenerationMixin
from .loading_checks import check_loaded
from .model_policy import PolicyMixin
from .prompt import check_inputs
from .quantization import QuantizationMixin, keep_safety_modules, share_quantization
from .safety_labels import IGNORE_INDEX
from .safety_modules import SafetyModules, SafetyTokens, combine_losses, safety_losses
from .safety_policy import SafetyPolicy
from .safety_verdict import HeadReading, SafetyVerdict, assess_rows

logger = logging.get_logger(__name__)


@dataclass
class SafeVlmOutput(ModelOutput):
    """
    Args:
        loss (`torch.FloatTensor` of shape `(1,)`, *optional*): LM loss + coefficients x safety losses.
        lm_loss, safety_level_loss, safety_category_loss (`torch.FloatTensor` of shape `(1,)`, *optional*): Its parts.
        logits (`torch.FloatTensor` of shape `(batch_size, sequence_length, vocab_size)`)
        safety_level_logits (`torch.FloatTensor` of shape `(batch_size, num_levels)`): Of each row's worst image; 0 for
            rows without one. `None` if the batch has no images.
        safety_category_logits (`torch.FloatTensor` of shape `(batch_size, num_categories)`): Likewise.
        safety_assessed (`torch.BoolTensor` of shape `(batch_size,)`): Whether the row has an image.
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
        # Only the safety modules get here: the base initialises its own.
        if isinstance(module, (SafetyTokens, nn.Embedding)):
            nn.init.normal_(module.weight, std=self.config.initializer_range)
        elif isinstance(module, (nn.Linear, nn.Conv2d)):
            # Preserves the variance through the modules' depth at any width; 0.02 would only suit wide models.
            nn.init.xavier_uniform_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, (nn.LayerNorm, nn.GroupNorm)):
            nn.init.ones_(module.weight)
            nn.init.zeros_(module.bias)


class SafeVlmForConditionalGeneration(QuantizationMixin, SafeVlmPreTrainedModel, PolicyMixin, SafeVlmGenerationMixin):
    """A safe vision-language model. The package safevlm makes one from a base model, with `from_base`."""

    def __init__(self, config: SafeVlmConfig, base: PreTrainedModel | None = None):
        if config.base_config is None:
            raise ValueError(
                "The configuration has no `base_config`, so it is not a SafeVLM's. To make a base model safe, use "
                "`SafeVlmForConditionalGeneration.from_base` of the package safevlm."
            )
        # The wrapper has no embeddings of its own: tying them means tying the base's.
        config.base_config.tie_word_embeddings = config.tie_word_embeddings
        super().__init__(config)
        self.backbone = get_backbone(config.base_config)
        if config.safety_projector_type is None:
            config.safety_projector_type = self.backbone.projector_type
        self.base = AutoModelForImageTextToText.from_config(config.base_config) if base is None else base
        self.safety = SafetyModules(config, self.backbone.vision_hidden_size)
        self.post_init()
        # FSDP refuses class names that the model does not contain, which some vision towers declare.
        self._no_split_modules = {type(module).__name__ for module in self.modules()} & set(self._no_split_modules)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *args, output_loading_info=False, **kwargs):
        """
        As `PreTrainedModel.from_pretrained`, except that a checkpoint with missing weights is an error (with
        `output_loading_info=True` the caller gets the list) and that no `quantization_config` quantises the safety
        modules.
        """
        if kwargs.get("quantization_config") is not None:
            kwargs["quantization_config"] = keep_safety_modules(kwargs["quantization_config"])
        model, info = super().from_pretrained(pretrained_model_name_or_path, *args, output_loading_info=True, **kwargs)
        source = str(pretrained_model_name_or_path)
        share_quantization(model)
        model.check_policy_texts()
        check_loaded(model, source, None if output_loading_info else info)
        if weaknesses := model.policy_weaknesses():
            logger.warning_once(f"The policy saved with {source!r} is weak: {'; '.join(weaknesses)}.")
        return (model, info) if output_loading_info else model

    def save_pretrained(self, save_directory, *args, **kwargs):
        """As `PreTrainedModel.save_pretrained`; the saved model loads through all its Auto classes."""
        if hasattr(self, "peft_config"):
            raise ValueError(
                "The model contains PEFT layers (its training runs or was interrupted) and would not load again. "
                "Save it with `trainer.save_model(folder)`, which merges them, or continue with "
                "`trainer.train(resume_from_checkpoint=True)`."
            )
        if self._auto_class is not None:
            # transformers records one Auto class per model; this one loads through three.
            auto_map = getattr(self.config, "auto_map", None) or {}
            for auto_class in ("AutoModel", "AutoModelForMultimodalLM"):
                auto_map = {**auto_map, auto_class: "modeling_safevlm.SafeVlmForConditionalGeneration"}
            self.config.auto_map = auto_map
            # transformers saves the files that this one imports, so this adds the pipeline's.
            from .pipeline_safevlm import SafeVlmPipeline  # noqa: F401
        super().save_pretrained(save_directory, *args, **kwargs)

    # -- the safety path ---------------------------------------------------------------------------------------------

    def encode_images(self, input_ids: torch.Tensor, **image_inputs) -> ImageFeatures | None:
        """
        Vision features and safety features of a batch's images; `None` if it has none.

        Args:
            input_ids (`torch.LongTensor` of shape `(batch_size, sequence_length)`)
            image_inputs: The processor's image tensors: `pixel_values` and whatever else the family has.
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
        rows, units = units_of_images(input_ids, self.backbone.image_token_id, self.config, vision.tokens)
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
                read. By default every token but padding, so pass a mask if the prompt holds answers.
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
        embeddings = self.safety.embeddings
        if embeddings is None:
            return features.safety.new_zeros(0, self.config.get_text_config().hidden_size)
        category = torch.where(action == 0, self.config.labels.safe_category_id, category)
        device = compute_device(embeddings)
        rows = features.rows.to(device)
        return embeddings(features.safety.to(device), action.to(device)[rows], category.to(device)[rows]).flatten(0, 1)

    # -- one pass, for training and measuring ------------------------------------------------------------------------

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
        One pass, for training and measuring. It enforces no policy: a decoding loop around it is not guarded.

        Args:
            input_ids (`torch.LongTensor` of shape `(batch_size, sequence_length)`): With `<safety>` placeholders.
            labels (`torch.LongTensor` of shape `(batch_size, sequence_length)`): Token ids of answers, -100 elsewhere.
                A batch without any answer has no LM loss.
            safety_level_labels, safety_category_labels (`torch.LongTensor` of shape `(batch_size,)`): -100 is ignored.
            safety_question_mask (`torch.Tensor` of shape `(batch_size, sequence_length)`): See `predict_safety`; by
                default every token that `labels` does not supervise.
            condition_on_labels (`torch.BoolTensor` of shape `(batch_size,)`, *optional*): Rows whose safety embeddings
                are conditioned on their labels. All others are conditioned on the head's prediction.
            kwargs: For the base model (further image inputs, `num_items_in_batch`, ...).
        """
        check_inputs(input_ids, self.backbone.pixel_ndims, pixel_values, **kwargs)
        features = self.encode_images(input_ids, pixel_values=pixel_values, **kwargs)
        if safety_question_mask is None and labels is not None:
            attended = torch.ones_like(input_ids) if attention_mask is None else attention_mask
            safety_question_mask = attended.bool() & (labels == IGNORE_INDEX)
        reading = self.predict_safety(input_ids, attention_mask, features, safety_question_mask)

        has_answer = labels is not None and bool((labels[:, 1:] != IGNORE_INDEX).any())  # the loss would be 0 / 0
        base_inputs = dict(
            kwargs,
            input_ids=input_ids,
            attention_mask=attention_mask,
            labels=labels if has_answer else None,
            past_key_values=past_key_values,
            return_dict=True,
            **({} if labels is None else self.backbone.training_inputs(labels)),
        )
        embeddings = None
        if features is not None:
            action, category = self._training_condition(
                reading, safety_level_labels, safety_category_labels, condition_on_labels
            )
            embeddings = self.condition(features, action, category)
            base_inputs["mm_encoder_outputs"] = features.vision.mm_encoder_outputs
        start = 0 if past_key_values is None else int(past_key_values.get_seq_length())
        with override_embeddings(self.base, embeddings, input_ids, self.config.safety_token_id, start=start):
            output = self.base(**base_inputs)

        level_logits, category_logits, assessed = reading.per_row()
        losses = safety_losses(level_logits, category_logits, safety_level_labels, safety_category_labels, assessed)
        lm_loss = output.loss if has_answer else None
        coefs = self.config.safety_level_loss_coef, self.config.safety_category_loss_coef
        return SafeVlmOutput(
            loss=combine_losses(lm_loss, *losses.values(), *coefs),
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
        """Action and category ids per row: of its labels where `condition_on_labels` says so, else as predicted."""
        policy = self.resolve_policy()
        if not policy.enabled:  # a model saved with the policy "off" can still be trained
            policy = self.resolve_policy("default")
        verdict = self.apply_policy([reading], policy)
        if condition_on_labels is None or level_labels is None or category_labels is None:
            return verdict.action, verdict.category
        device = verdict.action.device
        level, category = level_labels.to(device), category_labels.to(device)
        use_labels = condition_on_labels.to(device) & (level != IGNORE_INDEX) & (category != IGNORE_INDEX)
        action = policy.action_table(self.config.labels).to(device)[category.clamp(min=0), level.clamp(min=0)]
        return torch.where(use_labels, action, verdict.action), torch.where(use_labels, category, verdict.category)

    # -- what transformers asks of a model ---------------------------------------------------------------------------

    @property
    def generation_config(self):
        """The base model's, since the base generates."""
        return self.base.generation_config

    @generation_config.setter
    def generation_config(self, value):
        # Before there is a base, transformers sets one made from the wrapper's config; the base makes its own.
        if "base" in self._modules:
            self.base.generation_config = value

    def get_output_embeddings(self):
        return self.base.get_output_embeddings()

    def set_output_embeddings(self, value):
        self.base.set_output_embeddings(value)

    def resize_token_embeddings(self, *args, **kwargs):
        embeddings = self.base.resize_token_embeddings(*args, **kwargs)
        self.config.base_config = self.base.config
        self.vocab_size = self.base.vocab_size
        return embeddings
