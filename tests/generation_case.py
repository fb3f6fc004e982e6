"""A base model and its SafeVLM, each with its processor, for generation tests that run on several families."""

from dataclasses import dataclass, field

import torch
from families import build
from tiny import encode, new_tokens, picture, safe_model

from safevlm import SafeVlmProcessor

FAMILIES = ["llava", "qwen2_5_vl"]
QUESTION = "What is in the picture?"
REFUSAL = "I can't help with this request: it involves politics."


@dataclass
class Case:
    """
    Args:
        base, base_processor: A plain base, not wrapped in a SafeVLM.
        model, processor: The SafeVLM of an equal base. Its safety embeddings are large enough to change answers.
    """

    family: str
    base: object = field(init=False)
    base_processor: object = field(init=False)
    model: object = field(init=False)
    processor: object = field(init=False)

    def __post_init__(self):
        wrapped, self.base_processor = build(self.family)
        self.base, _ = build(self.family)
        self.processor = SafeVlmProcessor.from_base(self.base_processor)
        self.model = safe_model(wrapped, self.processor)

    def inputs(self, *images: int):
        """A batch with the given number of images in each row."""
        return encode(self.processor, [QUESTION, "Is it yes?", "no"][: len(images)], list(images))

    def base_inputs(self, *images: int):
        return encode(self.base_processor, [QUESTION, "Is it yes?", "no"][: len(images)], list(images))

    def chat(self, messages, **template):
        """The inputs for one chat; its pictures are `picture(0)`, `picture(1)`, ..."""
        text = self.processor.apply_chat_template(messages, **(template or {"add_generation_prompt": True}))
        images = sum(part["type"] == "image" for message in messages for part in message["content"])
        return self.processor(images=[picture(i) for i in range(images)] or None, text=[text], return_tensors="pt")


def user(text: str, images: int = 0) -> dict:
    return {"role": "user", "content": [{"type": "image"}] * images + [{"type": "text", "text": text}]}


def assistant(text: str) -> dict:
    return {"role": "assistant", "content": [{"type": "text", "text": text}]}


def answer(model, inputs, seed: int = 0, **kwargs) -> torch.Tensor:
    """The new tokens."""
    torch.manual_seed(seed)
    output = model.generate(**inputs, **{"max_new_tokens": 8, **kwargs})
    return new_tokens(output if isinstance(output, torch.Tensor) else output.sequences, inputs)
