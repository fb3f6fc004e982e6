"""One way to ask a model: chats become inputs, the model answers or judges, and texts and verdicts come back.

The command line, the evaluation, the demo and the server all encode chats here. So a difference between two systems is
never one of padding, BOS tokens or templates.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from tqdm.auto import tqdm
from transformers import BatchFeature

from safevlm import SafeVlmConfig

Conversation = tuple[list[dict], Sequence[Image.Image]]  # messages with an {"type": "image"} part per image; images


@dataclass(frozen=True)
class Answer:
    """
    Args:
        text (`str`): What the user reads, without surrounding white space.
        verdict (`dict`, *optional*): A row of [`SafetyVerdict.to_list`]; `None` for a model without a safety head.
    """

    text: str
    verdict: dict[str, Any] | None = None


def is_safevlm(model) -> bool:
    return model.config.model_type == SafeVlmConfig.model_type


def question_chat(question: str, num_images: int = 1) -> list[dict]:
    """A chat of one question about `num_images` pictures."""
    content = [{"type": "image"} for _ in range(num_images)]
    return [{"role": "user", "content": [*content, {"type": "text", "text": question}]}]


def encode_chats(
    processor, chats: Sequence[list[dict]], images: Sequence[Sequence[Image.Image]], model
) -> BatchFeature:
    """
    Chats as one left-padded batch of inputs that ask for an answer, on the model's device and in its dtype.

    Args:
        processor: A [`SafeVlmProcessor`] or a base's own.
        images: The images of each chat. Either every chat has some or none has: some processors take no mixed batch.
    """
    prompts = [processor.apply_chat_template(chat, add_generation_prompt=True) for chat in chats]
    options = {}
    bos = processor.tokenizer.bos_token
    if bos and prompts[0].startswith(bos):  # some templates write the BOS token themselves
        options["add_special_tokens"] = False
    inputs = processor(
        images=[list(pictures) for pictures in images] if any(images) else None,
        text=prompts,
        return_tensors="pt",
        padding=len(chats) > 1,  # not every tokenizer has a padding token
        padding_side="left",
        **options,
    ).to(model.device, model.dtype)
    if not is_safevlm(model):
        inputs.pop("safety_question_mask", None)
    return inputs


@torch.no_grad()
def ask(
    model,
    processor,
    conversations: Sequence[Conversation],
    policy=None,
    batch_size: int | None = None,
    progress: str | None = None,
    **generation,
) -> list[Answer]:
    """
    Answers in the order of `conversations`.

    Args:
        model, processor: A SafeVLM, or a plain base with a [`SafeVlmProcessor`] or its own processor.
        policy (`SafetyPolicy`, `dict`, file or preset name, *optional*): For a SafeVLM; by default its own.
        batch_size (`int`, *optional*): Conversations of similar length are asked together. By default all are asked
            at once.
        progress (`str`, *optional*): Title of a progress bar.
        generation: For `generate`, such as `max_new_tokens` and `do_sample`.

    Raises:
        `ValueError`: A policy is given, but the model is not a SafeVLM.
    """
    check_takes_policy(model, policy)
    if is_safevlm(model):
        generation = {**generation, "safety_policy": policy, "tokenizer": processor.tokenizer}
    answers: list[Answer | None] = [None] * len(conversations)
    batches = _batches(conversations, batch_size)
    for batch in tqdm(batches, desc=progress, unit="batch", disable=progress is None):
        chats, images = zip(*(conversations[i] for i in batch), strict=True)
        inputs = encode_chats(processor, chats, images, model)
        output = model.generate(**inputs, return_dict_in_generate=True, **generation)
        new_tokens = output.sequences[:, inputs["input_ids"].shape[1] :]  # (batch, new tokens)
        texts = processor.tokenizer.batch_decode(new_tokens, skip_special_tokens=True)
        verdict = output.get("safety")
        verdicts = [None] * len(batch) if verdict is None else verdict.to_list()
        for i, text, verdict_of_row in zip(batch, texts, verdicts, strict=True):
            answers[i] = Answer(text.strip(), verdict_of_row)
    return answers


def assess(model, processor, chat: list[dict], images: Sequence[Image.Image], policy=None) -> dict[str, Any]:
    """A SafeVLM's verdict on one conversation, a row of [`SafetyVerdict.to_list`]; no answer is generated."""
    return model.assess(**encode_chats(processor, [chat], [images], model), safety_policy=policy).to_list()[0]


def verdict_line(verdict: dict[str, Any]) -> str:
    """A verdict in a few words, such as `"refuse; politics, high; risk 0.998"`."""
    if verdict["category"] is None:  # the head failed, or nothing was assessed
        return f"{verdict['action']}; {verdict.get('error', 'not assessed')}"
    return f"{verdict['action']}; {verdict['category']}, {verdict['level']}; risk {verdict['score']:.3f}"


def check_takes_policy(model, policy) -> None:
    """Raises `ValueError` if there is a `policy` for a model that cannot follow one."""
    if policy is not None and not is_safevlm(model):
        raise ValueError(f"`policy` {policy!r} needs a SafeVLM, but this is a {model.config.model_type} model.")


def _batches(conversations: Sequence[Conversation], batch_size: int | None) -> list[list[int]]:
    """Indices into `conversations`; those with and without images apart, and sorted by length if in batches."""
    batches = []
    for with_images in (True, False):
        indices = [i for i, (_, images) in enumerate(conversations) if bool(images) == with_images]
        if batch_size is not None:
            indices.sort(key=lambda i: _text_length(conversations[i][0]))
        size = batch_size or len(indices) or 1
        batches += [indices[start : start + size] for start in range(0, len(indices), size)]
    return batches


def _text_length(chat: list[dict]) -> int:
    return sum(len(part["text"]) for message in chat for part in message["content"] if part["type"] == "text")
