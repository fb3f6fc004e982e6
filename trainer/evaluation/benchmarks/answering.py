"""Asks a system: a SafeVLM, a plain base, or a base behind a guard model, with or without a guard prompt.

All are asked alike (`trainer/asking.py`), greedily unless a task samples, so that a difference in a table is a
difference between the systems.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from safevlm.safety_policy import SafetyPolicy
from safevlm.trainer.asking import Answer, Conversation, ask, check_takes_policy
from safevlm.trainer.loading import load_checkpoint

from .guard_models import Guard, load_guard

SAMPLING = ("temperature", "top_p", "top_k")


class Answerer:
    """
    Args:
        model, processor: As [`load_checkpoint`] returns them.
        policy (`SafetyPolicy`, `dict`, file or preset name, *optional*): For a SafeVLM; by default its own.
        prefix (`str`, *optional*): Text put before the first question, such as a guard prompt.
        guard (`Guard`, *optional*): Asked first. A request that it flags, or gives no clear reply on, is refused
            without asking the model.
    """

    def __init__(self, model, processor, policy=None, prefix: str | None = None, guard: Guard | None = None):
        check_takes_policy(model, policy)
        self.model, self.processor = model, processor
        self.policy, self.prefix, self.guard = policy, prefix, guard

    @classmethod
    def load(
        cls,
        checkpoint: str,
        policy=None,
        prefix: str | None = None,
        guard: str | None = None,
        device: str | None = None,
        dtype: str = "auto",
    ) -> Answerer:
        """From the folders or Hub ids of the model and, if there is one, the guard."""
        model, processor = load_checkpoint(checkpoint, device, dtype)
        loaded_guard = None if guard is None else load_guard(guard, model.device, dtype)
        return cls(model, processor, policy, prefix, loaded_guard)

    def answer(
        self,
        conversations: Sequence[Conversation],
        until: Sequence[str] = (),
        max_new_tokens: int = 256,
        **generation,
    ) -> list[Answer]:
        """
        Answers one batch of conversations. `Answer.verdict` is the SafeVLM's, or what the guard said, or `None`.

        Args:
            conversations: `(messages, images)` each, with messages in the Hub's chat format and one
                `{"type": "image"}` part per image.
            until: Strings that end an answer and are cut off.
            generation: For `generate`. Sampling settings are dropped unless `do_sample=True`.
        """
        if not generation.get("do_sample"):
            generation = {name: value for name, value in generation.items() if name not in SAMPLING}
            generation["do_sample"] = False
        answers: list[Answer | None] = [None] * len(conversations)
        guard_replies: list[dict | None] = [None] * len(conversations)
        if self.guard is not None:
            for i, (messages, images) in enumerate(conversations):
                guard_replies[i] = self.guard.check(question_text(messages), images)
                if guard_replies[i]["flagged"] is not False:  # without a clear reply nothing is let through
                    topic = guard_replies[i]["category"] or "unsafe content"
                    answers[i] = Answer(SafetyPolicy().refusal(topic), guard_replies[i])
        passed = [i for i, answer in enumerate(answers) if answer is None]
        generated = ask(
            self.model,
            self.processor,
            [(_with_prefix(conversations[i][0], self.prefix), conversations[i][1]) for i in passed],
            self.policy,
            max_new_tokens=max_new_tokens,
            **generation,
        )
        for i, answer in zip(passed, generated, strict=True):
            verdict = guard_replies[i] if answer.verdict is None else answer.verdict
            answers[i] = replace(answer, text=_cut(answer.text, until).strip(), verdict=verdict)
        return answers


def question_text(messages: list[dict]) -> str:
    """The text of the last user turn."""
    turn = next(message for message in reversed(messages) if message["role"] == "user")
    return "\n".join(part["text"] for part in turn["content"] if part["type"] == "text")


def _with_prefix(messages: list[dict], prefix: str | None) -> list[dict]:
    """`prefix` before the first user text; not every template has a system turn."""
    if prefix is None:
        return messages
    first = next(i for i, message in enumerate(messages) if message["role"] == "user")
    content = list(messages[first]["content"])
    position = next((i for i, part in enumerate(content) if part["type"] == "text"), len(content))
    content.insert(position, {"type": "text", "text": prefix.strip() + "\n\n"})
    return [*messages[:first], {**messages[first], "content": content}, *messages[first + 1 :]]


def _cut(text: str, until: Sequence[str]) -> str:
    for stop in until:
        text = text.split(stop)[0] if stop else text
    return text
