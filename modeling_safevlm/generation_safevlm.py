"""Risk-conditioned generation: image -> features -> verdict -> conditioned answer (paper, Algorithm 1).

`generate` encodes the images once, asks the safety head, lets the policy decide, and hands over to the base model's
own `generate`, so that every decoding strategy and family keeps working. The decision is carried out by conditioned
safety embeddings, by a text hint before the generation prompt, and, for `"refuse"`, by a forced refusal. What comes
back is [the caller's input ids; new tokens]: hints never show.
"""

import copy
from dataclasses import dataclass

import torch
from transformers import GenerationMixin, LogitsProcessorList

from .cached_prompt import picture_digests, remember_prompt, reuse_cache, uncached_features
from .embedding_override import override_embeddings
from .policy_enforcement import EnforcePolicy, PromptStreamer
from .policy_texts import check_policy_texts, row_texts
from .prompt import (
    PromptParts,
    check_attention,
    check_generation,
    check_inputs,
    edit_prompt,
    per_token,
    prompt_parts,
)
from .safety_policy import SafetyPolicy
from .safety_verdict import OFF, SafetyVerdict

POLICY_OFF = (-1, -1)  # in place of a row's action and category


@dataclass
class GuardedRequest:
    """
    What [`guard`] found out about a batch of prompts.

    Args:
        features (`ImageFeatures`, *optional*): `None` if there are no images.
        parts (`PromptParts`): Which tokens are questions.
        verdict (`SafetyVerdict`): The verdict on each row.
    """

    features: object | None
    parts: PromptParts
    verdict: SafetyVerdict


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
    ) -> SafetyVerdict:
        """
        The verdict without an answer (guard mode): vision tower and safety head only, no pass of the language model.

        Args:
            input_ids (`torch.LongTensor` of shape `(batch_size, sequence_length)`), attention_mask, image_inputs:
                What the processor returns.
            safety_policy (`SafetyPolicy`, `dict`, file or preset name, *optional*): Defaults to the model's own.
            safety_question_mask (`torch.LongTensor` of shape `(batch_size, sequence_length)`, *optional*):
                1 where no assistant wrote the text. The processor makes it from the chat (prompt.py says
                what the head reads).
        """
        check_inputs(input_ids, self.backbone.pixel_ndims, **image_inputs)
        policy = self.resolve_policy(safety_policy)
        attention_mask = self._attention_mask(input_ids, attention_mask)
        return self.guard(input_ids, attention_mask, policy, safety_question_mask, **image_inputs).verdict

    @torch.no_grad()
    def guard(
        self, input_ids, attention_mask, policy: SafetyPolicy, safety_question_mask=None, **image_inputs
    ) -> GuardedRequest:
        """
        The half that `assess` and `generate` share: from a batch of prompts to a verdict on each.

        Raises:
            `ValueError`: The language model would see what the head does not.
        """
        check_attention(input_ids, attention_mask, self.backbone.image_token_id)
        features = self.encode_images(input_ids, **image_inputs)
        parts = self.prompt_parts(input_ids, attention_mask, safety_question_mask)
        readings = self.predict_readings(input_ids, attention_mask, features, parts, policy.whole_conversation)
        return GuardedRequest(features, parts, self.apply_policy(readings, policy))

    def prompt_parts(self, input_ids, attention_mask, question_mask) -> PromptParts:
        """Which tokens of the prompts the head may read."""
        return prompt_parts(input_ids, attention_mask, question_mask, self.config.generation_prompt_token_ids)

    def predict_readings(self, input_ids, attention_mask, features, parts, whole_conversation=True):
        """What the head says in each of its readings of the prompts (see prompt.py), before any policy."""
        readings = [None] if features is None else parts.readings(whole_conversation)
        return [self.predict_safety(input_ids, attention_mask, features, reading) for reading in readings]

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
        left-padded, and without placeholders under the policy `"off"`.

        Args:
            safety_policy (`SafetyPolicy`, `dict`, file or preset name, *optional*):
                Defaults to the model's own policy. `"off"` gives the base model's output, bit for bit.
            safety_question_mask (`torch.LongTensor` of shape `(batch_size, sequence_length)`, *optional*): As in
                [`assess`].
            tokenizer (*optional*): Only needed for policies with texts that were not saved with the model; checks the
                others.
            streamer (*optional*): As in `GenerationMixin.generate`. One with a method `put_safety` gets the
                [`SafetyVerdict`] before the first token.
            inputs, generation_config, logits_processor, kwargs: As in `GenerationMixin.generate`. With
                `past_key_values`, `input_ids` and images are those of the whole conversation. The cache is used as
                far as it fits and is cut there: the answer is the same as without.

        Returns:
            Input ids as they were passed, followed by the new tokens. With `return_dict_in_generate=True` the output
            also has `safety`, a [`SafetyVerdict`]. Under a policy that is off all its actions are `"off"`.
        """
        if inputs is not None and kwargs.get("input_ids") is not None:
            raise ValueError(
                "`generate` got both `inputs` and `input_ids`, two names for one thing: pass one of them."
            )
        input_ids = kwargs.pop("input_ids", None) if inputs is None else inputs
        kwargs.pop("input_ids", None)
        check_inputs(input_ids, self.backbone.pixel_ndims, **kwargs)
        policy = self.resolve_policy(safety_policy)
        call = dict(kwargs, generation_config=generation_config, logits_processor=logits_processor)
        check_generation(call, self._setting, self.backbone.image_inputs, policy.enabled)
        attention_mask = self._attention_mask(input_ids, call.pop("attention_mask", None), call)
        if tokenizer is not None:
            call["tokenizer"] = getattr(tokenizer, "tokenizer", tokenizer)  # `transformers serve` passes its processor
        if streamer is not None:
            streamer = call["streamer"] = PromptStreamer(streamer, input_ids)
        if getattr(getattr(call.get("assistant_model"), "config", None), "model_type", None) == "safevlm":
            call["assistant_model"] = call["assistant_model"].base  # it only drafts; what counts is decided here
        image_inputs = {name: call[name] for name in self.backbone.image_inputs if call.get(name) is not None}

        guarded = enforcement = verdict = None
        verdicts = [POLICY_OFF] * len(input_ids)
        if policy.enabled:
            guarded = self.guard(input_ids, attention_mask, policy, safety_question_mask, **image_inputs)
            verdict = guarded.verdict
            verdicts = list(zip(verdict.action.tolist(), verdict.category.tolist(), strict=True))
            enforcement = self._enforce(call, input_ids, attention_mask, guarded, policy)
            if streamer is not None:
                streamer.start(enforcement, verdict)
        else:
            self._drop_placeholders(call, input_ids, attention_mask)

        self.backbone.forget(self.base)
        num_cached, pictures = self._continue(call, guarded, image_inputs, verdicts)
        embeddings = None
        if guarded is not None and guarded.features is not None:
            embeddings = self.condition(guarded.features, verdict.action, verdict.category)
        prompt, mask, placeholder = call["input_ids"], call["attention_mask"], self.config.safety_token_id
        with override_embeddings(self.base, embeddings, prompt, placeholder, num_cached):
            output = self.base.generate(**call)

        is_dict = not isinstance(output, torch.Tensor)
        sequences = output.sequences if is_dict else output
        if enforcement is not None:
            enforcement.verify(sequences)
        cache = output.get("past_key_values") if is_dict else call.get("past_key_values")
        if cache is not None:
            knowable = self.backbone.reads_forwards and (self._setting("num_beams", call) or 1) == 1
            remember_prompt(cache, sequences, mask, pictures, verdicts, knowable)
        # The caller's prompt goes back in front of the new tokens.
        originals = input_ids.to(sequences.device).repeat_interleave(len(sequences) // len(input_ids), dim=0)
        sequences = torch.cat([originals, sequences[:, prompt.shape[1] :]], dim=1)
        if not is_dict:
            return sequences
        output.sequences = sequences
        output["safety"] = (
            SafetyVerdict.unassessed(len(input_ids), self.config.labels, OFF) if verdict is None else verdict
        )
        return output

    def _no_continuous_batching(self, *args, **kwargs):
        raise NotImplementedError(
            "Continuous batching (`generate_batch`, a paged cache) ignores images and would by-pass the safety head. "
            "Call `generate` with a batch of inputs instead."
        )

    generate_batch = init_continuous_batching = continuous_batching_context_manager = _no_continuous_batching

    # -- carrying the verdict out ------------------------------------------------------------------------------------

    def _enforce(self, call: dict, input_ids, attention_mask, guarded: GuardedRequest, policy) -> EnforcePolicy:
        """Puts hints into the call's prompt and adds what writes forced refusals."""
        hints, refusals = row_texts(
            guarded.verdict, policy, self.config, self._control_token_ids(), call.get("tokenizer")
        )
        refusals = guarded.parts.open_answers(refusals, self.config.answer_opening_token_ids)
        columns = guarded.parts.hint_columns
        prompt = edit_prompt(input_ids, attention_mask, per_token(call, input_ids), hints, columns)
        added = prompt["input_ids"].shape[1] - input_ids.shape[1]
        self._keep_answer_length(call, added)
        call.update(prompt)
        enforcement = EnforcePolicy(
            refusals,
            prompt_length=prompt["input_ids"].shape[1],
            end_token_ids=self._end_token_ids(call),
            pad_token_id=self._setting("pad_token_id", call),
            forbidden_token_ids=[self.config.safety_token_id, self.backbone.image_token_id],
            vocab_size=self.config.get_text_config().vocab_size,
        )
        call["logits_processor"] = LogitsProcessorList([*(call["logits_processor"] or []), enforcement])
        return enforcement

    def _drop_placeholders(self, call: dict, input_ids, attention_mask):
        """The base's own prompt, padded on the side that it came padded on."""
        right = bool((attention_mask[:, -1] == 0).any())
        tensors = per_token(call, input_ids)
        call.update(edit_prompt(input_ids, attention_mask, tensors, drop_id=self.config.safety_token_id, right=right))

    def _continue(self, call: dict, guarded, image_inputs: dict, verdicts) -> tuple[int, torch.Tensor]:
        """
        Cuts the call's cache to what fits, and hands the base features where pixels were encoded here, or are partly
        in the cache. Returns how many tokens the cache holds, and what [`picture_digests`] says of the prompt.
        """
        cache, input_ids = call.get("past_key_values"), call["input_ids"]
        vision = None if guarded is None or guarded.features is None else guarded.features.vision
        if vision is None and cache is not None and "pixel_values" in image_inputs:
            vision = self.backbone.encode(self.base, **image_inputs)
        units = tokens = None
        if vision is not None and (cache is not None or self._setting("return_dict_in_generate", call)):
            units, tokens = self.backbone.units(**image_inputs), vision.tokens
        pictures = picture_digests(input_ids, self.backbone.image_token_id, units, tokens)
        num_cached = reuse_cache(
            cache, input_ids, call["attention_mask"], pictures, verdicts, self.config.safety_token_id
        )
        if vision is not None:
            call.pop("pixel_values")  # what else describes the images (grids, sizes) the base may need
            needed = uncached_features(vision.mm_encoder_outputs, self.base.config, input_ids, num_cached)
            if needed:
                call["mm_encoder_outputs"] = needed
        return num_cached, pictures

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

    def check_policy_texts(self, processor=None):
        """
        Raises `ValueError` if the token ids that the model has for its policy's texts cannot be right. Only with a
        `processor` (or tokenizer) can it be told whether they say what the texts say, and whether its placeholder is
        the model's.
        """
        check_policy_texts(self.config, self._control_token_ids(), processor)

    def _control_token_ids(self) -> set[int | None]:
        """Ids that no text of a policy may have."""
        ids = {self.config.safety_token_id, self.backbone.image_token_id, *self._end_token_ids({})}
        return ids | {self._setting(name, {}) for name in ("pad_token_id", "bos_token_id")}
