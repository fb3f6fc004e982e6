"""Risk-conditioned generation: image -> features -> verdict -> conditioned answer (paper, Algorithm 1).

`generate` encodes the images once, asks the safety head, lets the policy decide, and hands over to the base model's
own `generate`, so that every decoding strategy and family keeps working. The decision is carried out by conditioned
safety embeddings, by a text hint before the generation prompt, and, for `"refuse"`, by a forced refusal. What comes
back is [the caller's input ids; new tokens]: hints never show.
"""

import copy

import torch
from transformers import GenerationMixin, LogitsProcessor, LogitsProcessorList

from .embedding_hook import place_embeddings
from .safety_assessment import SafetyAssessment
from .safety_policy import ACTIONS, SafetyPolicy

REFUSE = ACTIONS.index("refuse")


class SafeVlmGenerationMixin(GenerationMixin):
    """`generate` and `assess` of [`SafeVlmForConditionalGeneration`]."""

    @torch.no_grad()
    def assess(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None, safety_policy=None, **image_inputs
    ) -> SafetyAssessment:
        """
        The verdict without an answer (guard mode): vision tower and safety head only, no pass of the language model.

        Args:
            input_ids (`torch.LongTensor` of shape `(batch_size, sequence_length)`), attention_mask, image_inputs:
                What the processor returns.
            safety_policy (`SafetyPolicy`, `dict`, file or preset name, *optional*): Defaults to the model's own.
        """
        check_inputs(input_ids, **image_inputs)
        policy = self.resolve_policy(safety_policy)
        attention_mask = self._attention_mask(input_ids, attention_mask)
        features = self.encode_images(input_ids, **image_inputs)
        prediction = self.predict_safety(input_ids, attention_mask, features)
        return self.apply_policy(prediction, policy)

    @torch.no_grad()
    def generate(
        self,
        inputs: torch.Tensor | None = None,
        generation_config=None,
        logits_processor: LogitsProcessorList | None = None,
        safety_policy=None,
        tokenizer=None,
        streamer=None,
        **kwargs,
    ):
        """
        Like the base model's `generate`, under a safety policy.

        Args:
            safety_policy (`SafetyPolicy`, `dict`, file or preset name, *optional*):
                Defaults to the model's own policy. `"off"` gives the base model's output, bit for bit.
            tokenizer (*optional*): Only needed for policies with texts that were not saved with the model.
            inputs, generation_config, logits_processor, streamer, kwargs: As in `GenerationMixin.generate`.

        Returns:
            Input ids as they were passed, followed by the new tokens. With `return_dict_in_generate=True` the output
            also has `safety`, a [`SafetyAssessment`]. Where a hint was inserted, its `past_key_values` is `None`: the
            cache holds the hint and does not match the returned ids.
        """
        input_ids = kwargs.pop("input_ids", None) if inputs is None else inputs
        check_inputs(input_ids, **kwargs)
        if "paged" in (kwargs.get("cache_implementation"), getattr(generation_config, "cache_implementation", None)):
            raise ValueError("`cache_implementation='paged'` by-passes the safety head. Use 'dynamic' or 'static'.")
        policy = self.resolve_policy(safety_policy)
        call = dict(kwargs, generation_config=generation_config)
        attention_mask = self._attention_mask(input_ids, call.pop("attention_mask", None), call)
        if tokenizer is not None:
            call["tokenizer"] = tokenizer
        # Tensors with one entry per prompt token (token types and the like) move along with the tokens.
        per_token = {
            name: value
            for name, value in call.items()
            if isinstance(value, torch.Tensor) and value.shape == input_ids.shape and name != "position_ids"
        }

        if not policy.enabled:
            prompt = edit_prompt(input_ids, attention_mask, per_token, drop_id=self.config.safety_token_id)
            call.update(prompt, logits_processor=logits_processor, streamer=_prompt_streamer(streamer, input_ids))
            return self._finish(self.base.generate(**call), input_ids, prompt, assessment=None)

        image_inputs = {name: call.pop(name) for name in self.backbone.image_inputs if name in call}
        features = self.encode_images(input_ids, **image_inputs)
        prediction = self.predict_safety(input_ids, attention_mask, features)
        assessment = self.apply_policy(prediction, policy)

        hints, refusals = self._policy_texts(assessment, policy, tokenizer)
        cache = call.get("past_key_values")
        num_cached = 0 if cache is None else int(cache.get_seq_length())
        if num_cached:  # positions are taken: a hint cannot go before what is in the cache already
            hints = [None] * len(hints)
        prompt = edit_prompt(
            input_ids, attention_mask, per_token, insertions=hints, before=self.config.generation_prompt_token_ids
        )
        self._keep_answer_length(call, added=prompt["input_ids"].shape[1] - input_ids.shape[1])
        call.update(prompt, streamer=_prompt_streamer(streamer, input_ids))
        call["logits_processor"] = LogitsProcessorList(
            [
                *(logits_processor or []),
                EnforcePolicy(
                    refusals,
                    prompt_length=prompt["input_ids"].shape[1],
                    end_token_id=next(iter(self._end_token_ids(call)), None),
                    forbidden_token_ids=[self.config.safety_token_id, self.backbone.image_token_id],
                ),
            ]
        )
        # Without images, or with all of them in the cache, the base gets no features.
        if features is None or not (input_ids[:, num_cached:] == self.backbone.image_token_id).any():
            return self._finish(self.base.generate(**call), input_ids, prompt, assessment)
        call["mm_encoder_outputs"] = features.vision.mm_encoder_outputs
        embeddings = self.condition(features, assessment.action, assessment.category)
        with place_embeddings(self.base, embeddings, prompt["input_ids"], self.config.safety_token_id):
            output = self.base.generate(**call)
        return self._finish(output, input_ids, prompt, assessment)

    def generate_batch(self, *args, **kwargs):
        raise NotImplementedError(
            "`generate_batch` (continuous batching with a paged cache) ignores images and would by-pass the safety "
            "head. Call `generate` with a batch of inputs instead."
        )

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
            return tokenizer(" " + text, add_special_tokens=False)["input_ids"]
        raise ValueError(
            f"The policy's text {text!r} has no token ids in this model. Pass `tokenizer=processor.tokenizer` to "
            f"`generate`, or store the policy with `model.set_safety_policy(policy, processor)`."
        )

    def _finish(self, output, input_ids, prompt, assessment):
        """Puts the caller's prompt back in front of the new tokens, and the assessment beside them."""
        sequences = output if isinstance(output, torch.Tensor) else output.sequences
        prompt_length = prompt["input_ids"].shape[1]
        originals = input_ids.to(sequences.device).repeat_interleave(len(sequences) // len(input_ids), dim=0)
        sequences = torch.cat([originals, sequences[:, prompt_length:]], dim=1)
        if isinstance(output, torch.Tensor):
            return sequences
        if prompt_length != input_ids.shape[1] and getattr(output, "past_key_values", None) is not None:
            output.past_key_values = None
        output.sequences = sequences
        output["safety"] = assessment
        return output


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
    if not isinstance(input_ids, torch.Tensor) or input_ids.ndim != 2 or input_ids.is_floating_point():
        got = repr(input_ids)
        if isinstance(input_ids, torch.Tensor):
            got = f"a {input_ids.dtype} tensor of shape {tuple(input_ids.shape)}"
        raise ValueError(
            f"`input_ids` must be a tensor of token ids of shape (batch_size, sequence_length), got {got}."
        )


class EnforcePolicy(LogitsProcessor):
    """
    Writes forced refusals, token by token, and keeps the model from writing placeholders.

    It runs after all other processors and leaves one token possible for refused rows, whatever prompt, sampling, beams
    or other processors want. Other rows of the batch are not touched.

    Args:
        refusals (`list[list[int] | None]`): One entry per prompt; `None` lets the model answer.
        prompt_length (`int`): Number of prompt tokens.
        end_token_id (`int`): Written after the refusal.
        forbidden_token_ids (`list[int]`): Placeholders. In an answer they would stand for images that are not there
            (prompt-lookup decoding copies them from the prompt).
    """

    def __init__(
        self,
        refusals: list[list[int] | None],
        prompt_length: int,
        end_token_id: int | None,
        forbidden_token_ids: list[int | None],
    ):
        self.prompt_length = prompt_length
        self.forbidden_token_ids = forbidden_token_ids
        self.script = None
        if any(refusal is not None for refusal in refusals):
            if end_token_id is None:
                raise ValueError("A forced refusal needs an end: set `eos_token_id` in the generation config.")
            length = max(len(refusal) for refusal in refusals if refusal is not None) + 1
            self.script = torch.tensor(
                [
                    [-1] * length if refusal is None else refusal + [end_token_id] * (length - len(refusal))
                    for refusal in refusals
                ]
            )

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        forbidden = [i for i in self.forbidden_token_ids if i is not None and i < scores.shape[1]]
        scores = scores.index_fill(1, torch.tensor(forbidden, device=scores.device), float("-inf"))
        if self.script is None:
            return scores
        self.script = self.script.to(scores.device)
        step = min(input_ids.shape[1] - self.prompt_length, self.script.shape[1] - 1)
        forced = self.script[:, step].repeat_interleave(len(scores) // len(self.script)).unsqueeze(1)
        only = torch.full_like(scores, float("-inf")).scatter(1, forced.clamp(min=0), 0.0)
        return torch.where(forced >= 0, only, scores)


def edit_prompt(
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor,
    per_token: dict[str, torch.Tensor] | None = None,
    insertions: list[list[int] | None] | None = None,
    before: list[int] | None = None,
    drop_id: int | None = None,
) -> dict[str, torch.Tensor]:
    """
    A left-padded batch of prompts with tokens inserted or dropped, row by row.

    Args:
        input_ids, attention_mask (`torch.LongTensor` of shape `(batch_size, sequence_length)`)
        per_token (`dict[str, torch.Tensor]`): More tensors of that shape; 0 at inserted and padded positions.
        insertions (`list[list[int] | None]`): Token ids to insert into each row, before the last occurrence of
            `before` (the generation prompt), or at the end of a row that has none.
        drop_id (`int`): Token id to drop everywhere.

    Returns:
        `dict` with the edited `input_ids`, `attention_mask` and `per_token` tensors; those passed if nothing changes.
    """
    per_token = per_token or {}
    insertions = insertions or [None] * len(input_ids)
    drops = drop_id is not None and bool((input_ids == drop_id).any())
    if not drops and all(insertion is None for insertion in insertions):
        return {"input_ids": input_ids, "attention_mask": attention_mask, **per_token}

    rows = []
    for row, insertion in enumerate(insertions):
        keep = attention_mask[row].bool()
        if drops:
            keep = keep & (input_ids[row] != drop_id)
        columns = keep.nonzero().squeeze(1)
        ids = input_ids[row, columns].tolist()
        at = last_occurrence(ids, before or [])
        rows.append((columns, at, insertion or []))
    length = max(len(columns) + len(insertion) for columns, _, insertion in rows)

    def rebuild(tensor, padding, inserted):
        out = tensor.new_full((len(rows), length), padding)
        for row, (columns, at, insertion) in enumerate(rows):
            kept = tensor[row, columns]
            middle = torch.tensor(insertion if inserted is None else [inserted] * len(insertion)).to(kept)
            values = torch.cat([kept[:at], middle, kept[at:]])
            out[row, length - len(values) :] = values
        return out

    # Padding is masked, so any id in the vocabulary will do; the row's own padding id keeps it recognisable.
    padded = input_ids[attention_mask == 0]
    return {
        "input_ids": rebuild(input_ids, int(padded[0]) if len(padded) else 0, None),
        "attention_mask": rebuild(attention_mask, 0, 1),
        **{name: rebuild(tensor, 0, 0) for name, tensor in per_token.items()},
    }


def last_occurrence(ids: list[int], pattern: list[int]) -> int:
    """Index where `pattern` last starts in `ids`; the end of `ids` if it does not occur (or is empty)."""
    for start in range(len(ids) - len(pattern), -1, -1):
        if pattern and ids[start : start + len(pattern)] == pattern:
            return start
    return len(ids)


class _PromptStreamer:
    """Hands a streamer the caller's prompt in place of the one with the hint; everything else goes through."""

    def __init__(self, streamer, input_ids):
        self.streamer, self.input_ids, self.started = streamer, input_ids, False

    def put(self, value):
        self.streamer.put(value if self.started else self.input_ids.cpu())
        self.started = True

    def end(self):
        self.streamer.end()


def _prompt_streamer(streamer, input_ids):
    return None if streamer is None else _PromptStreamer(streamer, input_ids)
