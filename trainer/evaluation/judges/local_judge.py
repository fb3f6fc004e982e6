"""Asks a local model in turns: the part of [`LocalJudge`] that knows models."""

import re
from collections.abc import Callable

import torch
from PIL import Image

from safevlm.trainer.evaluation.benchmarks.answering import Answerer

Respond = Callable[[list[tuple[str, str]], Image.Image | None, int], str]


def seeing_model(checkpoint: str, device: str | None, dtype) -> Respond:
    """A vision-language model. Its processor neutralises special tokens in all text."""
    answerer = Answerer.load(checkpoint, device=device, dtype=dtype)

    def respond(turns: list[tuple[str, str]], image: Image.Image | None, max_new_tokens: int) -> str:
        messages = [{"role": role, "content": [{"type": "text", "text": text}]} for role, text in turns]
        if image is not None:
            messages[0]["content"].insert(0, {"type": "image"})
        images = [] if image is None else [image]
        return answerer.answer([(messages, images)], max_new_tokens=max_new_tokens)[0].text

    return respond


def text_model(checkpoint: str, device: str | None, dtype) -> Respond:
    """A causal language model with a chat template; the image is not shown."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    if tokenizer.chat_template is None:
        raise ValueError(f"`model` {checkpoint!r} has no chat template; use a chat model as the judge.")
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=dtype).to(device).eval()
    special = {token.content for token in tokenizer.added_tokens_decoder.values()} | {*tokenizer.all_special_tokens}
    spelled = re.compile("|".join(re.escape(token) for token in sorted(special, key=len, reverse=True) if token))

    def neutralised(text: str) -> str:
        while found := spelled.search(text):
            cut = found.start() + 1
            text = f"{text[:cut]} {text[cut:]}"
        return text

    @torch.inference_mode()
    def respond(turns: list[tuple[str, str]], image: Image.Image | None, max_new_tokens: int) -> str:
        messages = [{"role": role, "content": neutralised(text)} for role, text in turns]
        inputs = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
        ).to(device)
        output = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
        return tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()

    return respond
