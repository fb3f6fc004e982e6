"""Conversations in, answers and verdicts out: the same call for a SafeVLM, a plain base and a base behind a guard.

All are asked alike, so that a difference in a table is the system's: greedy by default, left-padded batches, the same
chat template, and user text neutralised the same way ([`SafeVlmProcessor`] with no safety placeholders for a base).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image

from safevlm import SafeVlmConfig, SafeVlmForConditionalGeneration, SafeVlmProcessor
from safevlm.safety_policy import SafetyPolicy

from .guard_models import Guard, load_guard

SAMPLING = ("temperature", "top_p", "top_k")


@dataclass(frozen=True)
class Answer:
    """
    Args:
        text (`str`): What the user reads.
        verdict (`dict`, *optional*): The SafeVLM's verdict (see [`SafetyVerdict.to_list`]) or the guard's
            (see [`Guard.judge`]); `None` where nothing was judged.
    """

    text: str
    verdict: dict[str, Any] | None = None


class Answerer:
    """
    Args:
        model, processor: As [`load_checkpoint`] returns them.
        policy (`SafetyPolicy`, `dict`, file or preset name, *optional*): Of a SafeVLM; by default its own.
        prefix (`str`, *optional*): Text put before the first question, such as a guard prompt.
        guard (`Guard`, *optional*): Asked first; what it flags, or has no verdict on, is refused without asking the
            model.
    """

    def __init__(self, model, processor, policy=None, prefix: str | None = None, guard: Guard | None = None):
        self.model, self.processor, self.prefix, self.guard = model, processor, prefix, guard
        self.is_safe = model.config.model_type == SafeVlmConfig.model_type
        if policy is not None and not self.is_safe:
            raise ValueError(f"`policy` {policy!r} needs a SafeVLM, but this is a {model.config.model_type} model.")
        self.policy = policy

    @classmethod
    def load(
        cls,
        checkpoint: str,
        policy=None,
        prefix: str | None = None,
        guard: str | None = None,
        device=None,
        dtype="auto",
    ) -> Answerer:
        """From folders or Hub ids of the model and, if any, the guard."""
        model, processor = load_checkpoint(checkpoint, device, dtype)
        return cls(model, processor, policy, prefix, None if guard is None else load_guard(guard, model.device, dtype))

    @torch.inference_mode()
    def answer(
        self,
        conversations: Sequence[tuple[list[dict], list[Image.Image]]],
        until: Sequence[str] = (),
        max_new_tokens: int = 256,
        **generation,
    ) -> list[Answer]:
        """
        One batch.

        Args:
            conversations: `(messages, images)` each; messages in the Hub chat format, with an `{"type": "image"}`
                part per image.
            until: Strings that end an answer; they are cut off.
            generation: For `generate`. Sampling settings are dropped unless `do_sample=True`.
        """
        if not generation.get("do_sample"):
            generation = {name: value for name, value in generation.items() if name not in SAMPLING}
            generation["do_sample"] = False
        answers: list[Answer | None] = [None] * len(conversations)
        verdicts: list[dict | None] = [None] * len(conversations)
        if self.guard is not None:
            for i, (messages, images) in enumerate(conversations):
                verdicts[i] = self.guard.judge(question_text(messages), images)
                if verdicts[i]["flagged"] is not False:  # no verdict lets nothing through
                    policy = SafetyPolicy()
                    answers[i] = Answer(policy.refusal(verdicts[i]["category"] or "unsafe content"), verdicts[i])
        asked = [i for i, answer in enumerate(answers) if answer is None]
        # Some processors take no batch of which only some rows have images.
        for with_images in (True, False):
            part = [i for i in asked if bool(conversations[i][1]) == with_images]
            if part:
                texts, judged = self._generate([conversations[i] for i in part], max_new_tokens, generation)
                for i, text, verdict in zip(part, texts, judged, strict=True):
                    answers[i] = Answer(_cut(text, until).strip(), verdicts[i] if verdict is None else verdict)
        return answers

    def _generate(self, conversations, max_new_tokens: int, generation: dict):
        processor = self.processor
        texts = [
            processor.apply_chat_template(_with_prefix(messages, self.prefix), add_generation_prompt=True)
            for messages, _ in conversations
        ]
        images = [pictures for _, pictures in conversations]
        bos = processor.tokenizer.bos_token
        inputs = processor(
            images=images if images[0] else None,
            text=texts,
            return_tensors="pt",
            padding=True,
            padding_side="left",
            add_special_tokens=not (bos and texts[0].startswith(bos)),  # some templates write it themselves
        ).to(self.model.device, self.model.dtype)
        if self.is_safe:
            generation = {**generation, "safety_policy": self.policy, "tokenizer": processor.tokenizer}
        else:
            inputs.pop("safety_question_mask", None)
        output = self.model.generate(
            **inputs, max_new_tokens=max_new_tokens, return_dict_in_generate=True, **generation
        )
        new = output.sequences[:, inputs["input_ids"].shape[1] :]
        verdict = output.get("safety")
        verdicts = [None] * len(texts) if verdict is None else verdict.to_list()
        return processor.tokenizer.batch_decode(new, skip_special_tokens=True), verdicts


def load_checkpoint(checkpoint: str, device=None, dtype="auto"):
    """
    A SafeVLM or any other vision-language model, ready to answer, and its processor.

    Args:
        checkpoint (`str`): Folder or Hub id.
        device (*optional*): By default the first GPU where there is one.
        dtype: Of the weights, such as `"bfloat16"`; `"auto"` keeps the checkpoint's.
    """
    from transformers import AutoConfig, AutoModelForImageTextToText

    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if AutoConfig.from_pretrained(checkpoint).model_type == SafeVlmConfig.model_type:
        model = SafeVlmForConditionalGeneration.from_pretrained(checkpoint, dtype=dtype)
        processor = SafeVlmProcessor.from_pretrained(checkpoint)
    else:
        model = AutoModelForImageTextToText.from_pretrained(checkpoint, dtype=dtype)
        processor = SafeVlmProcessor.from_base(checkpoint, tokens_per_image=0)
    return model.to(device).eval(), processor


def question_text(messages: list[dict]) -> str:
    """The text of the last user turn."""
    turn = next(message for message in reversed(messages) if message["role"] == "user")
    return "\n".join(part["text"] for part in turn["content"] if part["type"] == "text")


def _with_prefix(messages: list[dict], prefix: str | None) -> list[dict]:
    """`prefix` before the first user text: not every template has a system turn."""
    if prefix is None:
        return messages
    first = next(i for i, message in enumerate(messages) if message["role"] == "user")
    content = list(messages[first]["content"])
    at = next((i for i, part in enumerate(content) if part["type"] == "text"), len(content))
    content.insert(at, {"type": "text", "text": prefix.strip() + "\n\n"})
    return [*messages[:first], {**messages[first], "content": content}, *messages[first + 1 :]]


def _cut(text: str, until: Sequence[str]) -> str:
    for stop in until:
        text = text.split(stop)[0] if stop else text
    return text
