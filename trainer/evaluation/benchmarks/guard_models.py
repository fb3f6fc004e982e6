"""Guard models to compare with: a second model that judges a request before the base answers it.

Two kinds: ShieldGemma 2, which classifies each image against its policies and does not read the question, and models
that write a verdict, such as the Llama Guard vision models and LlavaGuard (guard_replies.py reads it). What is no
verdict is never taken for "safe": [`Answerer`] refuses, and the results count it.
"""

from __future__ import annotations

import math
from typing import Any, Protocol

import torch
from PIL import Image

from .guard_replies import parse_verdict


class Guard(Protocol):
    def judge(self, question: str, images: list[Image.Image]) -> dict[str, Any]:
        """
        Returns `guard` (class name), `flagged` (`bool`, or `None` where the guard gave no verdict),
        `category` (`str` or `None`), and what else the guard says.
        """


def load_guard(checkpoint: str, device, dtype="auto") -> Guard:
    """The guard of a folder or Hub id; its kind follows from the checkpoint's model type."""
    from transformers import (
        AutoConfig,
        AutoModelForImageTextToText,
        AutoProcessor,
        ShieldGemma2ForImageClassification,
    )

    processor = AutoProcessor.from_pretrained(checkpoint)
    if AutoConfig.from_pretrained(checkpoint).model_type == "shieldgemma2":
        model = ShieldGemma2ForImageClassification.from_pretrained(checkpoint, dtype=dtype)
        return ShieldGemmaGuard(model.to(device).eval(), processor)
    model = AutoModelForImageTextToText.from_pretrained(checkpoint, dtype=dtype)
    return TextVerdictGuard(model.to(device).eval(), processor)


class ShieldGemmaGuard:
    """
    Flags a request if any image breaks any of the processor's policies with a probability of `threshold` or more.

    Args:
        model (`ShieldGemma2ForImageClassification`), processor (`ShieldGemma2Processor`)
        threshold (`float` in [0, 1])
    """

    def __init__(self, model, processor, threshold: float = 0.5):
        self.model, self.processor, self.threshold = model, processor, threshold

    @torch.inference_mode()
    def judge(self, question: str, images: list[Image.Image]) -> dict[str, Any]:
        verdict = {"guard": type(self).__name__, "flagged": False, "category": None, "score": None}
        if not images:
            return verdict  # it has nothing to look at
        policies = list(self.processor.policy_definitions)
        inputs = self.processor(images=images, policies=policies, return_tensors="pt")
        inputs = inputs.to(self.model.device, self.model.dtype)
        violated = self.model(**inputs).probabilities[:, 0]  # (images * policies,), of the token "Yes"
        worst = int(violated.argmax())
        score = violated[worst].item()
        if math.isnan(score):
            return {**verdict, "flagged": None}
        return {
            **verdict,
            "flagged": score >= self.threshold,
            "category": policies[worst % len(policies)] if score >= self.threshold else None,
            "score": score,
        }


class TextVerdictGuard:
    """
    A guard that writes its verdict, in a form that guard_replies.py knows.

    Args:
        model: A vision-language model. processor: Its processor; the chat template holds the guard's instructions.
        max_new_tokens (`int`): Enough for a rationale. A reply that is cut off before the verdict is none.
    """

    def __init__(self, model, processor, max_new_tokens: int = 512):
        self.model, self.processor, self.max_new_tokens = model, processor, max_new_tokens

    @torch.inference_mode()
    def judge(self, question: str, images: list[Image.Image]) -> dict[str, Any]:
        content = [{"type": "image"} for _ in images] + [{"type": "text", "text": question}]
        prompt = self.processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
        bos = self.processor.tokenizer.bos_token
        inputs = self.processor(
            images=images or None,
            text=prompt,
            return_tensors="pt",
            add_special_tokens=not (bos and prompt.startswith(bos)),
        ).to(self.model.device, self.model.dtype)
        sequences = self.model.generate(**inputs, do_sample=False, max_new_tokens=self.max_new_tokens)
        reply = self.processor.decode(sequences[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        flagged, category = parse_verdict(reply)
        return {"guard": type(self).__name__, "flagged": flagged, "category": category, "reply": reply}
