"""The model of the Space: its verdicts and its streamed answers. It needs only transformers and the model's own code.

Questions go through the processor's chat template, which keeps user text from becoming control tokens. Answers come
from `model.generate`, which enforces the policy. On ZeroGPU hardware (package `spaces`) the calls run on a borrowed
GPU.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

try:  # must be imported before torch, because ZeroGPU replaces CUDA
    import spaces
except ImportError:
    spaces = None

import torch
from limits import Refused
from PIL import Image
from settings import Settings
from transformers import AutoModelForImageTextToText, AutoProcessor, StoppingCriteria, TextIteratorStreamer

OFF = "off"
PRESETS = ("default", "paper", "strict", OFF)
# Takes the place of a verdict when the policy is off and nothing is assessed.
NO_VERDICT = {"assessed": False, "action": "off"} | dict.fromkeys(
    ("category", "level", "score", "level_probabilities", "category_probabilities")
)


@dataclass(frozen=True)
class Picture:
    """
    A picture in a conversation. Decoded pixels take far more memory than the file, so they are not kept.

    Args:
        decode (`Callable[[], PIL.Image.Image]`): Reads the file again.
        size (`tuple[int, int]`): Width and height in pixels.
        shown (`str`): A small copy as a data URI.
    """

    decode: Callable[[], Image.Image]
    size: tuple[int, int] = (1, 1)
    shown: str = ""


@dataclass
class Turn:
    """
    A question in a conversation, and its answer.

    Args:
        question (`str`)
        picture (`Picture`, *optional*): The picture that was sent with the question.
        answer (`str`): The answer so far.
        safety (`dict`, *optional*): The verdict on the conversation so far, a row of `SafetyVerdict.to_list()`.
    """

    question: str
    picture: Picture | None = None
    answer: str = ""
    safety: dict | None = None


class ChatModel:
    """
    The SafeVLM behind the page.

    Args:
        settings (`Settings`): Names the model and the policies on offer.
    """

    def __init__(self, settings: Settings):
        source = {"revision": settings.revision or None, "trust_remote_code": True}
        self.processor = AutoProcessor.from_pretrained(settings.model, **source)
        model = AutoModelForImageTextToText.from_pretrained(settings.model, dtype="auto", **source)
        if model.config.model_type != "safevlm":
            raise ValueError(f"SAFEVLM_MODEL {settings.model!r} is a {model.config.model_type!r}, not a SafeVLM.")
        if hasattr(model, "check_policy_texts"):  # the code of an older model may lack it
            model.check_policy_texts(self.processor)
        self.model = model.to("cuda" if torch.cuda.is_available() else "cpu").eval()
        self.max_new_tokens, self.max_seconds = settings.max_new_tokens, settings.max_answer_seconds
        self.policies = allowed_policies(model, settings.policies)
        self._off = model.resolve_policy(OFF)
        self.answer, self.assess = _on_gpu(self.answer), _on_gpu(self.assess)

    def assess(self, turns: list[Turn], policy: str) -> Iterator[dict]:
        """Yields a verdict per turn, each assessed on its own. The language model does not run."""
        for turn in turns:
            inputs = self.encode([turn])
            yield self.model.assess(**inputs, safety_policy=self._policy(policy)).to_list()[0]

    def answer(self, turns: list[Turn], policy: str) -> Iterator[tuple[dict, str]]:
        """
        Answers the last question of a conversation. Yields the verdict with the answer so far; the first time, before
        there is any text.

        Args:
            turns (`list[Turn]`): The last one has no answer yet.
            policy (`str`): One of `policies`, or `"off"`: the base model answers unfiltered, and the verdict is
                `NO_VERDICT`.

        Raises:
            `Refused`: The conversation and a full answer do not fit into the model's context.
        """
        inputs = self.encode(turns)
        length = inputs["input_ids"].shape[1] + self.max_new_tokens
        if length > self.model.config.get_text_config().max_position_embeddings:
            if len(turns) > 1:
                raise Refused("This conversation is too long for the model. Start a new one.")
            raise Refused("The question is too long for the model. Shorten it.")
        resolved = self._policy(policy)
        verdict, answer = None if resolved.enabled else NO_VERDICT, ""
        for piece in self._generate(inputs, resolved):
            if isinstance(piece, dict):
                verdict = piece
            else:
                answer += piece
            yield verdict, answer.lstrip()
        yield verdict, answer.strip()

    def encode(self, turns: list[Turn]):
        """The model's inputs for a conversation whose last question has no answer yet."""
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

    def _generate(self, inputs, policy) -> Iterator[dict | str]:
        """Yields the verdict, unless the policy is off, then the answer in pieces."""
        streamer = _VerdictStreamer(self.processor.tokenizer, skip_prompt=True, skip_special_tokens=True)
        abandoned, deadline = threading.Event(), time.monotonic() + self.max_seconds
        failures = []

        def generate():
            try:
                self.model.generate(
                    **inputs,
                    safety_policy=policy,
                    tokenizer=self.processor.tokenizer,
                    max_new_tokens=self.max_new_tokens,
                    stopping_criteria=[_StopWhen(lambda: abandoned.is_set() or time.monotonic() >= deadline)],
                    streamer=streamer,
                )
            except Exception as error:  # raised again below, in the thread that serves the visitor
                failures.append(error)
            finally:
                streamer.end()

        thread = threading.Thread(target=generate, daemon=True)
        thread.start()
        try:
            yield from streamer
        finally:  # also runs when the visitor presses Stop or leaves
            abandoned.set()
            thread.join()
        if failures:
            raise failures[0]

    def _policy(self, name: str):
        return self._off if name == OFF else self.policies[name]


def allowed_policies(model, names: tuple[str, ...]) -> dict:
    """
    The policies that visitors can choose from, by name.

    The name of a preset always means the preset, even if the model's own policy has that name. Presets keep the
    model's calibration: visitors choose thresholds and actions, not the temperatures of the probabilities.
    """
    own, policies = model.resolve_policy(), {}
    for name in names:
        path = Path(name)
        if path.suffix and path.stem.lower() in PRESETS:
            raise ValueError(
                f"SAFEVLM_POLICIES names the file {name!r}, which visitors would take for a preset. Rename it."
            )
        if path.stem in policies:
            raise ValueError(f"SAFEVLM_POLICIES names {path.stem!r} twice: {', '.join(names)}. Remove one.")
        policies[path.stem] = own if name == own.name and name not in PRESETS else model.resolve_policy(name)
    return policies


def _on_gpu(function):
    return function if spaces is None else spaces.GPU(function)


class _VerdictStreamer(TextIteratorStreamer):
    """Also queues the verdict, which `generate` passes to `put_safety` before the first token."""

    def put_safety(self, verdict):
        self.text_queue.put(verdict.to_list()[0])


class _StopWhen(StoppingCriteria):
    def __init__(self, ended: Callable[[], bool]):
        self.ended = ended

    def __call__(self, input_ids, scores, **kwargs):
        return torch.full((len(input_ids),), self.ended(), dtype=torch.bool, device=input_ids.device)
