"""The model of the Space: verdicts and streamed answers. Only transformers and the model's own code are needed.

A question goes through the processor's chat template, which keeps user text from becoming a control token, and every
answer through `model.generate`, which enforces the policy. On ZeroGPU (package `spaces`) both run on a borrowed GPU.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

try:  # before torch: ZeroGPU stands in for CUDA
    import spaces
except ImportError:
    spaces = None

import torch
from guards import Refused
from PIL import Image
from settings import Settings
from transformers import AutoModelForImageTextToText, AutoProcessor, StoppingCriteria, TextIteratorStreamer

OFF = "off"
PRESETS = ("default", "paper", "strict", OFF)
# What stands for the verdict where the policy is off: nothing was assessed.
NO_VERDICT = {"assessed": False, "action": "off"} | dict.fromkeys(
    ("category", "level", "score", "level_probabilities", "category_probabilities")
)


@dataclass(frozen=True)
class Picture:
    """
    A picture in a conversation. Its pixels, many times the file, are decoded when they are needed and not kept.

    Args:
        decode (`Callable[[], PIL.Image.Image]`): Reads the file again.
        size (`tuple[int, int]`): Width and height in pixels.
        shown (`str`): A small copy, as a data URI.
    """

    decode: Callable[[], Image.Image]
    size: tuple[int, int] = (1, 1)
    shown: str = ""


@dataclass
class Turn:
    """
    Args:
        question (`str`)
        picture (`Picture`, *optional*): What came with it.
        answer (`str`): The answer so far.
        safety (`dict`, *optional*): The verdict on the conversation up to here, a row of `SafetyVerdict.to_list()`.
    """

    question: str
    picture: Picture | None = None
    answer: str = ""
    safety: dict | None = None


class Engine:
    """
    Args:
        settings (`Settings`): Names the model and the allowed policies.
    """

    def __init__(self, settings: Settings):
        source = {"revision": settings.revision or None, "trust_remote_code": True}
        self.processor = AutoProcessor.from_pretrained(settings.model, **source)
        model = AutoModelForImageTextToText.from_pretrained(settings.model, dtype="auto", **source)
        if model.config.model_type != "safevlm":
            raise ValueError(f"SAFEVLM_MODEL {settings.model!r} is a {model.config.model_type!r}, not a SafeVLM.")
        if hasattr(model, "check_policy_texts"):  # its code is as old as the model
            model.check_policy_texts(self.processor)
        self.model = model.to("cuda" if torch.cuda.is_available() else "cpu").eval()
        self.max_new_tokens, self.max_seconds = settings.max_new_tokens, settings.max_answer_seconds
        self.policies = allowed_policies(model, settings.policies)
        self._off = model.resolve_policy(OFF)
        self.answer = _on_gpu(self._answer)
        self.assess = _on_gpu(self._assess)

    def _assess(self, turns: list[Turn], policy: str) -> Iterator[dict]:
        """One verdict per turn, each judged by itself; the language model does not run."""
        for turn in turns:
            inputs = self._inputs([turn])
            yield self.model.assess(**inputs, safety_policy=self._policy(policy)).to_list()[0]

    def _answer(self, turns: list[Turn], policy: str) -> Iterator[tuple[dict, str]]:
        """
        The verdict on a conversation, before the first word, and, growing, the answer to its last question.

        Args:
            turns (`list[Turn]`): The last one has no answer yet.
            policy (`str`): One of `policies`, or `"off"`: no safety step, and `NO_VERDICT` in place of the verdict.
        """
        inputs = self._inputs(turns)
        length = inputs["input_ids"].shape[1] + self.max_new_tokens
        if length > self.model.config.get_text_config().max_position_embeddings:
            what = "conversation is too long for the model. Start a new one."
            raise Refused(f"This {what}" if len(turns) > 1 else "The question is too long for the model. Shorten it.")
        rules = self._policy(policy)
        verdict, answer = None if rules.enabled else NO_VERDICT, ""
        for piece in self._generate(inputs, rules):
            if isinstance(piece, dict):
                verdict = piece
            else:
                answer += piece
            yield verdict, answer.lstrip()
        yield verdict, answer.strip()

    def _generate(self, inputs, rules) -> Iterator[dict | str]:
        """The verdict, unless the rules are off, then the answer in pieces."""
        streamer = _VerdictStreamer(self.processor.tokenizer, skip_prompt=True, skip_special_tokens=True)
        abandoned, deadline = threading.Event(), time.monotonic() + self.max_seconds
        failures = []

        def generate():
            try:
                self.model.generate(
                    **inputs,
                    safety_policy=rules,
                    tokenizer=self.processor.tokenizer,
                    max_new_tokens=self.max_new_tokens,
                    stopping_criteria=[_StopWhen(lambda: abandoned.is_set() or time.monotonic() >= deadline)],
                    streamer=streamer,
                )
            except Exception as error:  # raised below, in the thread that answers the visitor
                failures.append(error)
            finally:
                streamer.end()

        thread = threading.Thread(target=generate, daemon=True)
        thread.start()
        try:
            yield from streamer
        finally:  # also where the visitor pressed Stop or left
            abandoned.set()
            thread.join()
        if failures:
            raise failures[0]

    def _policy(self, name: str):
        return self._off if name == OFF else self.policies[name]

    def _inputs(self, turns: list[Turn]):
        messages = []
        for turn in turns:
            content = [{"type": "image"}] if turn.picture is not None else []
            messages.append({"role": "user", "content": [*content, {"type": "text", "text": turn.question}]})
            if turn is not turns[-1]:
                messages.append({"role": "assistant", "content": [{"type": "text", "text": turn.answer}]})
        images = [turn.picture.decode() for turn in turns if turn.picture is not None]
        prompt = self.processor.apply_chat_template(messages, add_generation_prompt=True)
        inputs = self.processor(images=images or None, text=[prompt], return_tensors="pt")
        return inputs.to(self.model.device, self.model.dtype)


def allowed_policies(model, names: tuple[str, ...]) -> dict:
    """
    The policies by name. A preset is the preset, whatever the model calls its own policy, and keeps the calibration of
    that: what visitors choose is thresholds and actions, not how sure the head is.
    """
    own, policies = model.resolve_policy(), {}
    for name in names:
        path = Path(name)
        if path.suffix and path.stem.lower() in PRESETS:
            raise ValueError(f"SAFEVLM_POLICIES names the file {name!r}, which visitors would take for a preset.")
        if path.stem in policies:
            raise ValueError(f"SAFEVLM_POLICIES names {path.stem!r} twice: {', '.join(names)}.")
        policies[path.stem] = own if name == own.name and name not in PRESETS else model.resolve_policy(name)
    return policies


def _on_gpu(function):
    return function if spaces is None else spaces.GPU(function)


class _VerdictStreamer(TextIteratorStreamer):
    """Also hands over the verdict, which `generate` gives it before the first token."""

    def put_safety(self, verdict):
        self.text_queue.put(verdict.to_list()[0])


class _StopWhen(StoppingCriteria):
    def __init__(self, ended: Callable[[], bool]):
        self.ended = ended

    def __call__(self, input_ids, scores, **kwargs):
        return torch.full((len(input_ids),), self.ended(), dtype=torch.bool, device=input_ids.device)
