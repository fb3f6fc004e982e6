"""Risk-conditioned generation: image -> features -> verdict -> conditioned answer (paper, Algorithm 1).

First guard, then answer. [`SafeVlmGenerationMixin.guard`] gives a verdict on each prompt; `assess` stops there.
`generate` carries the verdict out in three ways and leaves the rest to the base's own `generate`, so that every
decoding method and family works: safety embeddings conditioned on the verdict, a text hint before the generation
prompt, and a forced refusal for the action `"refuse"`. It returns the caller's input ids and the new tokens; hints
never show.
"""

import copy
from dataclasses import dataclass

import torch
from transformers import GenerationMixin, LogitsProcessorList

from .cached_prompt import picture_digests, remember_prompt, reuse_cache, token_keys, uncached_features
from .embedding_override import override_embeddings
from .policy_enforcement import EnforcePolicy, PromptStreamer
from .prompt import PromptParts, check_attention, check_generation, check_inputs, edit_prompt, per_token, prompt_parts
from .safety_policy import SafetyPolicy
from .safety_verdict import OFF, SafetyVerdict


@dataclass
class GuardedPrompt:
    """
    What [`SafeVlmGenerationMixin.guard`] knows about a batch of prompts.

    Args:
        verdict (`SafetyVerdict`): The verdict on each row.
        features (`ImageFeatures`, *optional*): `None` without images.
        parts (`PromptParts`, *optional*): Which tokens are questions.
    """

    verdict: SafetyVerdict
    features: object | None = None
    parts: PromptParts | None = None


class SafeVlmGenerationMixin(GenerationMixin):
    """
    `assess` and `generate` of a model that has `base`, `backbone` and `config`, a policy ([`PolicyMixin`]), and the
    four steps `encode_images`, `predict_safety`, `apply_policy` and `condition`.
    """

    # -- guard -------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def assess(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        safety_policy=None,
        safety_question_mask: torch.Tensor | None = None,
        **image_inputs,
    ) -> SafetyVerdict:
        """
        The verdict without an answer: runs the vision tower and the safety head, not the language model.

        Args:
            input_ids (`torch.LongTensor` of shape `(batch_size, sequence_length)`), attention_mask, image_inputs:
                What the processor returns.
            safety_policy (`SafetyPolicy`, `dict`, file or preset name, *optional*): Defaults to the model's own.
            safety_question_mask (`torch.LongTensor` of shape `(batch_size, sequence_length)`, *optional*): From the
                processor: 1 for text not written by the assistant, which is what the head reads (see prompt.py).
        """
        check_inputs(input_ids, self.backbone.pixel_ndims, **image_inputs)
        policy = self.resolve_policy(safety_policy)
        attention_mask = self._attention_mask(input_ids, attention_mask, {})
        return self.guard(input_ids, attention_mask, policy, safety_question_mask, **image_inputs).verdict

    @torch.no_grad()
    def guard(
        self, input_ids, attention_mask, policy: SafetyPolicy, safety_question_mask=None, **image_inputs
    ) -> GuardedPrompt:
        """
        From a batch of prompts to a verdict on each: the half that `assess` and `generate` share.

        Raises:
            `ValueError`: The language model would see something that the head does not.
        """
        check_attention(input_ids, attention_mask, self.backbone.image_token_id)
        features = self.encode_images(input_ids, **image_inputs)
        parts = self.prompt_parts(input_ids, attention_mask, safety_question_mask)
        readings = self.predict_readings(input_ids, attention_mask, features, parts, policy.whole_conversation)
        return GuardedPrompt(self.apply_policy(readings, policy), features, parts)

    def prompt_parts(self, input_ids, attention_mask, question_mask) -> PromptParts:
        """Which tokens of the prompts the head may read."""
        return prompt_parts(input_ids, attention_mask, question_mask, self.config.generation_prompt_token_ids)

    def predict_readings(self, input_ids, attention_mask, features, parts: PromptParts, whole_conversation=True):
        """The head's logits for each reading of the prompts (see prompt.py), before any policy."""
        readings = [None] if features is None else parts.readings(whole_conversation)
        return [self.predict_safety(input_ids, attention_mask, features, reading) for reading in readings]

    # -- answer ------------------------------------------------------------------------------------------------------

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

        Logits processors and stopping criteria see the language model's own prompt: left-padded and with the hint, if
        there is one; under the policy `"off"` without placeholders.

        Args:
            safety_policy (`SafetyPolicy`, `dict`, file or preset name, *optional*): Defaults to the model's own.
                `"off"` gives the base model's output, bit for bit.
            safety_question_mask (`torch.LongTensor` of shape `(batch_size, sequence_length)`, *optional*): As in
                [`assess`].
            tokenizer (*optional*): Encodes the policy's texts that were not saved with the model; checks the others.
            streamer (*optional*): As in `GenerationMixin.generate`. If it has a method `put_safety`, that gets the
                [`SafetyVerdict`] before the first token.
            inputs, generation_config, logits_processor, kwargs: As in `GenerationMixin.generate`. With
                `past_key_values`, pass `input_ids` and images of the whole conversation. The cache is cut where it
                does not fit, so the answer is the same as without it.

        Returns:
            The input ids as they were passed, followed by the new tokens. With `return_dict_in_generate=True` the
            output also has `safety`, a [`SafetyVerdict`].
        """
        if inputs is not None and kwargs.get("input_ids") is not None:
            raise ValueError("`generate` got both `inputs` and `input_ids`, which mean the same: pass one of them.")
        given_ids = kwargs.pop("input_ids", None)
        input_ids = given_ids if inputs is None else inputs
        check_inputs(input_ids, self.backbone.pixel_ndims, **kwargs)
        policy = self.resolve_policy(safety_policy)
        call = dict(kwargs, generation_config=generation_config, logits_processor=logits_processor)
        check_generation(call, self._setting, self.backbone.image_inputs, policy.enabled)
        attention_mask = self._attention_mask(input_ids, call.pop("attention_mask", None), call)
        if tokenizer is not None:
            call["tokenizer"] = getattr(tokenizer, "tokenizer", tokenizer)  # `transformers serve` passes its processor
        if streamer is not None:
            call["streamer"] = PromptStreamer(streamer, input_ids)
        if getattr(getattr(call.get("assistant_model"), "config", None), "model_type", None) == "safevlm":
            call["assistant_model"] = call["assistant_model"].base  # it only drafts; the policy is enforced here

        image_inputs = {name: call[name] for name in self.backbone.image_inputs if call.get(name) is not None}
        if policy.enabled:
            guarded = self.guard(input_ids, attention_mask, policy, safety_question_mask, **image_inputs)
        else:
            guarded = GuardedPrompt(SafetyVerdict.unassessed(len(input_ids), self.config.labels, OFF))
        enforcement = self._prepare_prompt(call, input_ids, attention_mask, guarded, policy)
        output = self._answer(call, guarded, image_inputs, enforcement)

        is_dict = not isinstance(output, torch.Tensor)
        sequences = output.sequences if is_dict else output
        # The caller's prompt goes back in front of the new tokens.
        prompts = input_ids.to(sequences.device).repeat_interleave(len(sequences) // len(input_ids), dim=0)
        sequences = torch.cat([prompts, sequences[:, call["input_ids"].shape[1] :]], dim=1)
        if not is_dict:
            return sequences
        output.sequences = sequences
        output["safety"] = guarded.verdict
        return output

    def _prepare_prompt(self, call: dict, input_ids, attention_mask, guarded: GuardedPrompt, policy):
        """
        Writes the language model's prompt into `call`, and, under a policy, what enforces the verdict there: hints in
        the prompt, and a logits processor for forced refusals. Returns that processor.
        """
        tensors = per_token(call, input_ids)
        if not policy.enabled:  # the base's own prompt, padded on the side that it came padded on
            right = bool((attention_mask[:, -1] == 0).any())
            token_id = self.config.safety_token_id
            call.update(edit_prompt(input_ids, attention_mask, tensors, drop_id=token_id, right=right))
            return None
        hints, refusals = self.row_texts(guarded.verdict, policy, call.get("tokenizer"))
        call.update(edit_prompt(input_ids, attention_mask, tensors, hints, guarded.parts.hint_columns))
        self._keep_answer_length(call, call["input_ids"].shape[1] - input_ids.shape[1])
        enforcement = EnforcePolicy(
            guarded.parts.open_answers(refusals, self.config.answer_opening_token_ids),
            prompt_length=call["input_ids"].shape[1],
            end_token_ids=self._end_token_ids(call),
            pad_token_id=self._setting("pad_token_id", call),
            forbidden_token_ids=[self.config.safety_token_id, self.backbone.image_token_id],
            vocab_size=self.config.get_text_config().vocab_size,
        )
        call["logits_processor"] = LogitsProcessorList([*(call["logits_processor"] or []), enforcement])
        if "streamer" in call:
            call["streamer"].start(enforcement, guarded.verdict)
        return enforcement

    def _answer(self, call: dict, guarded: GuardedPrompt, image_inputs: dict, enforcement: EnforcePolicy | None):
        """
        The base's `generate` on its own prompt, with safety embeddings conditioned on the verdict. Continues from
        the caller's cache as far as it matches the prompt.
        """
        self.backbone.forget(self.base)
        prompt, verdict, features = call["input_ids"], guarded.verdict, guarded.features
        conditions = list(zip(verdict.action.tolist(), verdict.category.tolist(), strict=True))
        vision = None if features is None else features.vision
        keys, num_cached = self._reuse_cache(call, conditions, vision, image_inputs)
        embeddings = None if features is None else self.condition(features, verdict.action, verdict.category)
        with override_embeddings(self.base, embeddings, prompt, self.config.safety_token_id, num_cached):
            output = self.base.generate(**call)
        is_tensor = isinstance(output, torch.Tensor)
        sequences = output if is_tensor else output.sequences
        if enforcement is not None:
            enforcement.verify(sequences)
        cache = call.get("past_key_values") if is_tensor else output.get("past_key_values")
        if cache is not None:
            knowable = self.backbone.reads_forwards and (self._setting("num_beams", call) or 1) == 1
            remember_prompt(cache, sequences, keys, knowable)
        return output

    def _reuse_cache(self, call: dict, conditions, vision, image_inputs: dict):
        """
        Cuts the call's cache where it stops fitting the prompt, and gives the base the vision features that it does
        not hold. Returns the prompt's [`token_keys`], and how many of its tokens the cache holds.
        """
        cache, input_ids = call.get("past_key_values"), call["input_ids"]
        if vision is None and cache is not None and "pixel_values" in image_inputs:
            vision = self.backbone.encode(self.base, **image_inputs)
        units = tokens = None
        if vision is not None and (cache is not None or self._setting("return_dict_in_generate", call)):
            units, tokens = self.backbone.units(**image_inputs), vision.tokens
        pictures = picture_digests(input_ids, self.backbone.image_token_id, units, tokens)
        keys = token_keys(input_ids, call["attention_mask"], pictures, conditions, self.config.safety_token_id)
        num_cached = reuse_cache(cache, keys)
        if vision is not None:
            call.pop("pixel_values")  # the base may need the other image inputs (grids, sizes)
            needed = uncached_features(vision.mm_encoder_outputs, self.base.config, input_ids, num_cached)
            if needed:
                call["mm_encoder_outputs"] = needed
        return keys, num_cached

    def _no_continuous_batching(self, *args, **kwargs):
        raise NotImplementedError(
            "Continuous batching (`generate_batch`, a paged cache) ignores images and would bypass the safety head. "
            "Call `generate` with a batch of inputs instead."
        )

    generate_batch = init_continuous_batching = continuous_batching_context_manager = _no_continuous_batching

    # -- settings of a call ------------------------------------------------------------------------------------------

    def _attention_mask(self, input_ids, attention_mask, call: dict) -> torch.Tensor:
        if attention_mask is not None:
            if attention_mask.shape != input_ids.shape:
                raise ValueError(
                    f"`attention_mask` must have the shape of `input_ids`, {tuple(input_ids.shape)}, "
                    f"got {tuple(attention_mask.shape)}."
                )
            return attention_mask
        pad = self._setting("pad_token_id", call)
        if pad is not None and pad not in self._end_token_ids(call):
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
