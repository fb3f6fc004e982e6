"""A judge that runs on this machine: a Hub model, with or without eyes."""

import os
import re
from collections.abc import Callable

import torch
from PIL import Image
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING

from safevlm.trainer.asking import ask
from safevlm.trainer.loading import default_device, load_checkpoint

from .judgement_cache import JudgementCache
from .model_judge import ModelJudge, Turn

Respond = Callable[[list[Turn], Image.Image | None, int], str]
"""From turns, an image and the largest number of new tokens to a reply."""


class LocalJudge(ModelJudge):
    """
    A Hub model that replies greedily: a vision-language model, or a text-only model, which does not see the image.

    Special tokens spelled in the judged text are broken up, so an answer cannot end its turn in the chat template.

    Args:
        model (`str`): Folder or Hub id.
        cache: See [`Judge`].
        device (`str`, *optional*): By default the first GPU, or the CPU if there is none.
        dtype (`str`): Of the weights; `"auto"` keeps the checkpoint's.
        max_new_tokens (`int`): Longest reply.
    """

    def __init__(
        self,
        model: str,
        cache: str | os.PathLike | JudgementCache | None = None,
        device: str | None = None,
        dtype: str = "auto",
        max_new_tokens: int = 256,
    ):
        self.sees = type(AutoConfig.from_pretrained(model)) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
        parameters = {"max_new_tokens": max_new_tokens, "dtype": str(dtype), "sees": self.sees}
        super().__init__(f"local:{model}", parameters, cache)
        self.max_new_tokens = max_new_tokens
        self._respond = (seeing_model if self.sees else text_model)(model, device, dtype)

    def reply(self, system: str, turns: list[Turn], image: Image.Image | None) -> tuple[str, dict[str, float]]:
        # Not every chat template has a system turn, so the instructions open the first user turn.
        turns = [(turns[0][0], f"{system}\n\n{turns[0][1]}"), *turns[1:]]
        return self._respond(turns, image if self.sees else None, self.max_new_tokens), {}


def seeing_model(checkpoint: str, device: str | None, dtype: str) -> Respond:
    """A vision-language model. Its processor neutralises special tokens in all text."""
    model, processor = load_checkpoint(checkpoint, device, dtype)

    def respond(turns: list[Turn], image: Image.Image | None, max_new_tokens: int) -> str:
        messages = [{"role": role, "content": [{"type": "text", "text": text}]} for role, text in turns]
        images = [] if image is None else [image]
        messages[0]["content"] = [{"type": "image"} for _ in images] + messages[0]["content"]
        [answer] = ask(model, processor, [(messages, images)], do_sample=False, max_new_tokens=max_new_tokens)
        return answer.text

    return respond


def text_model(checkpoint: str, device: str | None, dtype: str) -> Respond:
    """A causal language model with a chat template, which is not shown the image."""
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    if tokenizer.chat_template is None:
        raise ValueError(f"`model` {checkpoint!r} has no chat template; use a chat model as the judge.")
    device = device or default_device()
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=dtype).to(device).eval()
    special = {token.content for token in tokenizer.added_tokens_decoder.values()} | {*tokenizer.all_special_tokens}
    spelled = re.compile("|".join(re.escape(token) for token in sorted(special, key=len, reverse=True) if token))

    def neutralised(text: str) -> str:
        while match := spelled.search(text):
            cut = match.start() + 1
            text = f"{text[:cut]} {text[cut:]}"
        return text

    @torch.inference_mode()
    def respond(turns: list[Turn], image: Image.Image | None, max_new_tokens: int) -> str:
        messages = [{"role": role, "content": neutralised(text)} for role, text in turns]
        inputs = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
        ).to(device)
        output = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
        return tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()

    return respond
