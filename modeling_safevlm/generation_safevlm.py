"""Risk-conditioned generation: image -> features -> verdict -> conditioned answer (paper, Algorithm 1).

`generate` encodes the images once, asks the safety head, lets the policy decide, and hands over to the base model's
own `generate`, so that every decoding strategy and family keeps working. The decision is carried out by conditioned
safety embeddings, by a text hint before the generation prompt, and, for `"refuse"`, by a forced refusal. What comes
back is [the caller's input ids; new tokens]: hints never show.
"""

import copy

import torch
from transformers import GenerationMixin, LogitsProcessorList

from .cached_prompt import remember_prompt, reuse_cache, uncached_features
from .embedding_hook import place_embeddings
from .policy_enforcement import EnforcePolicy, PromptStreamer
from .prompt_editing import edit_prompt, hint_column, open_answers
from .question_reading import PromptParts, prompt_parts
from .safety_assessment import SafetyAssessment
from .safety_policy import ACTIONS, SafetyPolicy

REFUSE = ACTIONS.index("refuse")
POLICY_OFF = (-1, -1)  # in place of a row's action and category


class SafeVlmGenerationMixin(GenerationMixin):
    """`generate` and `assess` of [`SafeVlmForConditionalGeneration`]."""

    @torch.no_grad()
    def assess(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        safety_policy=None,
        safety_question_mask: torch.Tensor | None = None,
        **image_inputs,
    ) -> SafetyAssessment:
        """
        The verdict without an answer (guard mode): vision tower and safety head only, no pass of the language model.

        Args:
            input_ids (`torch.LongTensor` of shape `(batch_size, sequence_length)`), attention_mask, image_inputs:
                What the processor returns.
            safety_policy (`SafetyPolicy`, `dict`, file or preset name, *optional*): Defaults to the model's own.
            safety_question_mask (`torch.LongTensor` of shape `(batch_size, sequence_length)`, *optional*):
                1 where no assistant wrote the text. The processor makes it from the chat (question_reading.py says
                what the head reads).
        """
        check_inputs(input_ids, **image_inputs)
        policy = self.resolve_policy(safety_policy)
        attention_mask = self._attention_mask(input_ids, attention_mask)
        features = self.encode_images(input_ids, **image_inputs)
        parts = self.prompt_parts(input_ids, attention_mask, safety_question_mask)
        return self._assess_readings(input_ids, attention_mask, features, parts, policy)

    @torch.no_grad()
    def generate(
        self,
        inputs: torch.Tensor | None = None,
        generation_config=None,
        logits_processor: LogitsProcessorList | None = None,
        safety_policy=None,
        safety_question_mask: torch.Tensor | None = None,
        tokenizer=None,
        streamer=None,
        **kwargs,
    ):
        """
        Like the base model's `generate`, under a safety policy.

        Logits processors and stopping criteria see the language model's own prompt: with the hint, if there is one,
        and without placeholders under the policy `"off"`.

        Args:
            safety_policy (`SafetyPolicy`, `dict`, file or preset name, *optional*):
                Defaults to the model's own policy. `"off"` gives the base model's output, bit for bit.
            safety_question_mask (`torch.LongTensor` of shape `(batch_size, sequence_length)`, *optional*): As in
                [`assess`].
            tokenizer (*optional*): Only needed for policies with texts that were not saved with the model.
            streamer (*optional*): As in `GenerationMixin.generate`. One with a method `put_safety` gets the
                [`SafetyAssessment`] before the first token.
            inputs, generation_config, logits_processor, kwargs: As in `GenerationMixin.generate`. With
                `past_key_values`, `input_ids` and images are those of the whole conversation. The cache is used as
                far as it fits and is cut there: the answer is the same as without.

        Returns:
            Input ids as they were passed, followed by the new tokens. With `return_dict_in_generate=True` the output
            also has `safety`, a [`SafetyAssessment`].
        """
        input_ids = kwargs.pop("input_ids", None) if inputs is None else inputs
        check_inputs(input_ids, **kwargs)
        check_generation(generation_config, kwargs)
        policy = self.resolve_policy(safety_policy)
        call = dict(kwargs, generation_config=generation_config, logits_processor=logits_processor)
        attention_mask = self._attention_mask(input_ids, call.pop("attention_mask", None), call)
        if tokenizer is not None:
            call["tokenizer"] = tokenizer
        if streamer is not None:
            call["streamer"] = PromptStreamer(streamer, input_ids)
        if getattr(getattr(call.get("assistant_model"), "config", None), "model_type", None) == "safevlm":
            call["assistant_model"] = call["assistant_model"].base  # it only drafts; what counts is decided here
        # Tensors with one entry per prompt token (token types and the like) move along with the tokens.
        per_token = {
            name: value
            for name, value in call.items()
            if isinstance(value, torch.Tensor) and value.shape == input_ids.shape and "negative_prompt" not in name
        }
        image_inputs = {name: call[name] for name in self.backbone.image_inputs if name in call}

        features = assessment = enforcement = None
        verdicts = [POLICY_OFF] * len(input_ids)
        if policy.enabled:
            features = self.encode_images(input_ids, **image_inputs)
            parts = self.prompt_parts(input_ids, attention_mask, safety_question_mask)
            assessment = self._assess_readings(input_ids, attention_mask, features, parts, policy)
            if hasattr(streamer, "put_safety"):
                streamer.put_safety(assessment)
            verdicts = list(zip(assessment.action.tolist(), assessment.category.tolist(), strict=True))
            hints, refusals = self._policy_texts(assessment, policy, tokenizer)
            prompts = [row[mask.bool()].tolist() for row, mask in zip(input_ids, attention_mask, strict=True)]
            opened = self.config.generation_prompt_token_ids, self.config.answer_opening_token_ids
            refusals = open_answers(refusals, prompts, *opened)
            prompt = edit_prompt(input_ids, attention_mask, per_token, hints, self._hint_columns(input_ids, parts))
            self._keep_answer_length(call, added=prompt["input_ids"].shape[1] - input_ids.shape[1])
            enforcement = EnforcePolicy(
                refusals,
                prompt_length=prompt["input_ids"].shape[1],
                end_token_id=next(iter(self._end_token_ids(call)), None),
                forbidden_token_ids=[self.config.safety_token_id, self.backbone.image_token_id],
            )
            call["logits_processor"] = LogitsProcessorList([*(logits_processor or []), enforcement])
        else:
            prompt = edit_prompt(input_ids, attention_mask, per_token, drop_id=self.config.safety_token_id)
        call.update(prompt)

        cache = call.get("past_key_values")
        num_cached = reuse_cache(
            cache, prompt["input_ids"], prompt["attention_mask"], verdicts, self.config.safety_token_id
        )
        self._hand_over_images(call, features, image_inputs, num_cached)
        output = self._generate_with_base(call, features, assessment)

        sequences = output if isinstance(output, torch.Tensor) else output.sequences
        if enforcement is not None:
            enforcement.verify(sequences)
        cache = cache if isinstance(output, torch.Tensor) else output.get("past_key_values")
        if cache is not None:
            num_beams = self._setting("num_beams", call) or 1
            remember_prompt(cache, sequences, prompt["attention_mask"], verdicts, num_beams)
        # The caller's prompt goes back in front of the new tokens.
        originals = input_ids.to(sequences.device).repeat_interleave(len(sequences) // len(input_ids), dim=0)
        sequences = torch.cat([originals, sequences[:, prompt["input_ids"].shape[1] :]], dim=1)
        if isinstance(output, torch.Tensor):
            return sequences
        output.sequences = sequences
        output["safety"] = assessment
        return output

    def generate_batch(self, *args, **kwargs):
        raise NotImplementedError(
            "`generate_batch` (continuous batching with a paged cache) ignores images and would by-pass the safety "
            "head. Call `generate` with a batch of inputs instead."
        )

    # -- the verdict -------------------------------------------------------------------------------------------------

    def prompt_parts(self, input_ids, attention_mask, question_mask) -> PromptParts:
        """Which tokens of the prompts the head may read."""
        return prompt_parts(input_ids, attention_mask, question_mask, self.config.generation_prompt_token_ids)

    def _assess_readings(self, input_ids, attention_mask, features, parts, policy) -> SafetyAssessment:
        readings = self.predict_readings(input_ids, attention_mask, features, parts, policy.whole_conversation)
        return self.apply_policy(readings, policy)

    def predict_readings(self, input_ids, attention_mask, features, parts, whole_conversation=True):
        """What the head says in each of its readings of the prompts (see question_reading.py), before any policy."""
        readings = [None] if features is None else parts.readings(whole_conversation)
        return [self.predict_safety(input_ids, attention_mask, features, reading) for reading in readings]

    def _hint_columns(self, input_ids, parts) -> list[int]:
        rows = zip(input_ids.tolist(), parts.questions.tolist(), strict=True)
        return [hint_column(ids, mask, self.config.generation_prompt_token_ids) for ids, mask in rows]

    # -- handing over to the base ------------------------------------------------------------------------------------

    def _hand_over_images(self, call: dict, features, image_inputs: dict, num_cached: int):
        """The base gets features rather than pixels where those were encoded here or are partly in the cache."""
        if features is None and (not num_cached or image_inputs.get("pixel_values") is None):
            return
        call.pop("pixel_values")  # what else describes the images (grids, sizes) the base may need
        vision = self.backbone.encode(self.base, **image_inputs) if features is None else features.vision
        needed = uncached_features(vision.mm_encoder_outputs, self.base.config, call["input_ids"], num_cached)
        if needed:
            call["mm_encoder_outputs"] = needed

    def _generate_with_base(self, call: dict, features, assessment):
        if features is None:
            return self.base.generate(**call)
        embeddings = self.condition(features, assessment.action, assessment.category)
        with place_embeddings(self.base, embeddings, call["input_ids"], self.config.safety_token_id):
            return self.base.generate(**call)

    def _attention_mask(self, input_ids, attention_mask, call=None) -> torch.Tensor:
        if attention_mask is not None:
            if attention_mask.shape != input_ids.shape:
                raise ValueError(
                    f"`attention_mask` must have the shape of `input_ids`, {tuple(input_ids.shape)}, "
                    f"got {tuple(attention_mask.shape)}."
                )
            return attention_mask
        pad = self._setting("pad_token_id", call or {})
        if pad is not None and pad not in self._end_token_ids(call or {}):
            return (input_ids != pad).long()
        return torch.ones_like(input_ids)

    def _setting(self, name: str, call: dict):
        """A generation setting as the base's `generate` resolves it: argument, passed config, the model's config."""
        if name in call:
            return call[name]
        value = getattr(call.get("generation_config"), name, None)
        return getattr(self.generation_config, name, None) if value is None else value

    def _end_token_ids(self, call: dict) -> list[int]:
        eos = self._setting("eos_token_id", call)
        return [] if eos is None else torch.as_tensor(eos).flatten().tolist()

    def _keep_answer_length(self, call: dict, added: int):
        """`max_length` and `min_length` count the caller's prompt, not the hint."""
        for name, instead in (("max_length", "max_new_tokens"), ("min_length", "min_new_tokens")):
            length = self._setting(name, call)
            if not added or length is None or self._setting(instead, call) is not None:
                continue
            if call.get(name) is None and call["generation_config"] is not None:
                call["generation_config"] = copy.deepcopy(call["generation_config"])
                setattr(call["generation_config"], name, length + added)
            else:
                call[name] = length + added

    def _policy_texts(self, assessment: SafetyAssessment, policy: SafetyPolicy, tokenizer):
        """Token ids of each row's hint and forced refusal, `None` where there is none."""
        hints, refusals = [], []
        for action, category in zip(assessment.action.tolist(), assessment.category.tolist(), strict=True):
            name = self.config.category_names[category]
            forced = action == REFUSE and policy.forced_refusal
            hint = None if forced else policy.hint(ACTIONS[action], name)
            hints.append(None if hint is None else self._text_ids(hint, tokenizer))
            refusals.append(self._text_ids(policy.refusal(name), tokenizer) if forced else None)
        return hints, refusals

    def _text_ids(self, text: str, tokenizer) -> list[int]:
        if (ids := self.config.policy_token_ids.get(text)) is not None:
            return [int(i) for i in ids.split()]
        if tokenizer is not None:
            space = "" if self.config.answer_opening_token_ids else " "
            return tokenizer(space + text, add_special_tokens=False)["input_ids"]
        raise ValueError(
            f"The policy's text {text!r} has no token ids in this model. Pass `tokenizer=processor.tokenizer` to "
            f"`generate`, or store the policy with `model.set_safety_policy(policy, processor)`."
        )


def check_inputs(input_ids, inputs_embeds=None, mm_encoder_outputs=None, **kwargs):
    """Raises if a prompt does not come as token ids and pixels, which is what the safety head reads."""
    if inputs_embeds is not None:
        raise ValueError(
            "`inputs_embeds` cannot be passed: the safety head reads the prompt's token ids. "
            "Pass `input_ids` (and `pixel_values`) from the processor."
        )
    if mm_encoder_outputs is not None:
        raise ValueError(
            "`mm_encoder_outputs` cannot be passed: the safety head needs the vision tower's features. "
            "Pass `pixel_values` from the processor."
        )
    for name, value in kwargs.items():
        if value is not None and ("video" in name or name == "input_features"):
            raise ValueError(f"`{name}` cannot be passed: the safety head reads images only, no video or sound.")
    if not isinstance(input_ids, torch.Tensor) or input_ids.ndim != 2 or input_ids.is_floating_point():
        got = repr(input_ids)
        if isinstance(input_ids, torch.Tensor):
            got = f"a {input_ids.dtype} tensor of shape {tuple(input_ids.shape)}"
        raise ValueError(
            f"`input_ids` must be a tensor of token ids of shape (batch_size, sequence_length), got {got}."
        )


def check_generation(generation_config, kwargs: dict):
    """Raises for what cannot work under a policy."""
    if "paged" in (kwargs.get("cache_implementation"), getattr(generation_config, "cache_implementation", None)):
        raise ValueError("`cache_implementation='paged'` by-passes the safety head. Use 'dynamic' or 'static'.")
    if kwargs.get("position_ids") is not None:
        raise ValueError(
            "`position_ids` cannot be passed to `generate`: hints and placeholders move tokens. Leave them out; they "
            "follow from `attention_mask`."
        )
