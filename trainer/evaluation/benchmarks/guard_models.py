"""Guard models to compare with: a second model that checks a request before the base answers it.

There are two kinds. ShieldGemma 2 classifies each image against its policies and does not read the question. Others,
such as the Llama Guard vision models and LlavaGuard, write a reply that `guard_replies.py` reads. A reply that it
cannot read is never taken for "safe": [`Answerer`] refuses, and the results count it.
"""

from __future__ import annotations

import math
from typing import Any, Protocol

import torch
from PIL import Image
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor, ShieldGemma2ForImageClassification

from safevlm.trainer.asking import ask, question_chat

from .guard_replies import parse_guard_reply


class Guard(Protocol):
    def check(self, question: str, images: list[Image.Image]) -> dict[str, Any]:
        """
        Returns a `dict` with `guard` (class name), `flagged` (`bool`, or `None` if the guard gave no clear reply),
        `category` (`str` or `None`), and whatever else the guard says.
        """


def load_guard(checkpoint: str, device, dtype="auto") -> Guard:
    """The guard of a folder or Hub id; the checkpoint's model type decides its kind."""
    processor = AutoProcessor.from_pretrained(checkpoint)
    if AutoConfig.from_pretrained(checkpoint).model_type == "shieldgemma2":
        model = ShieldGemma2ForImageClassification.from_pretrained(checkpoint, dtype=dtype)
        return ShieldGemmaGuard(model.to(device).eval(), processor)
    model = AutoModelForImageTextToText.from_pretrained(checkpoint, dtype=dtype)
    return TextVerdictGuard(model.to(device).eval(), processor)


class ShieldGemmaGuard:
    """
    Flags a request if any image violates any of the processor's policies with a probability of at least `threshold`.

    Args:
        model (`ShieldGemma2ForImageClassification`), processor (`ShieldGemma2Processor`)
        threshold (`float` in [0, 1])
    """

    def __init__(self, model, processor, threshold: float = 0.5):
        self.model, self.processor, self.threshold = model, processor, threshold

    @torch.inference_mode()
    def check(self, question: str, images: list[Image.Image]) -> dict[str, Any]:
        reply = {"guard": type(self).__name__, "flagged": False, "category": None, "score": None}
        if not images:
            return reply  # it has nothing to look at
        policies = list(self.processor.policy_definitions)
        inputs = self.processor(images=images, policies=policies, return_tensors="pt")
        inputs = inputs.to(self.model.device, self.model.dtype)
        violated = self.model(**inputs).probabilities[:, 0]  # (images * policies,): probability of the token "Yes"
        worst = int(violated.argmax())
        score = violated[worst].item()
        if math.isnan(score):
            return {**reply, "flagged": None}
        flagged = score >= self.threshold
        category = policies[worst % len(policies)] if flagged else None
        return {**reply, "flagged": flagged, "category": category, "score": score}


class TextVerdictGuard:
    """
    A guard that writes a reply in one of the forms that `guard_replies.py` knows.

    Args:
        model: A vision-language model.
        processor: Its processor, whose chat template holds the guard's instructions.
        max_new_tokens (`int`): Enough for a rationale. A reply that is cut off before the verdict counts as unclear.
    """

    def __init__(self, model, processor, max_new_tokens: int = 512):
        self.model, self.processor, self.max_new_tokens = model, processor, max_new_tokens

    def check(self, question: str, images: list[Image.Image]) -> dict[str, Any]:
        conversation = (question_chat(question, len(images)), images)
        [answer] = ask(self.model, self.processor, [conversation], do_sample=False, max_new_tokens=self.max_new_tokens)
        flagged, category = parse_guard_reply(answer.text)
        return {"guard": type(self).__name__, "flagged": flagged, "category": category, "reply": answer.text}
