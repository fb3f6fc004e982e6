"""Wrote the folders beside this file, run with the code of commit 5c91370. Kept as documentation: do not run it again.

That commit saved `full` (with its code), `adapter` (of the same model), `full_4bit` and `full_8bit`. `expected.json`
holds the verdicts and answers that it gave; tests/test_saved_models.py compares with them.

    python tests/saved_models/make.py
"""

import json
import sys
from pathlib import Path

import torch
from transformers import (
    BitsAndBytesConfig,
    CLIPVisionConfig,
    GenerationConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
)

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

from tiny import BENIGN, RISKY, judging_model, picture, safe_model, tiny_processor  # noqa: E402

from safevlm import SafeVlmForConditionalGeneration, SafeVlmProcessor  # noqa: E402

PICTURES = ["0.png", "1.png"]
# Each chat: turns as (role, text), and the pictures in the first user turn.
CHATS = {
    "risky": ([("user", RISKY)], ["0.png"]),
    "benign": ([("user", BENIGN)], ["0.png"]),
    "another picture": ([("user", RISKY)], ["1.png"]),
    "two pictures": ([("user", RISKY)], ["0.png", "1.png"]),
    "no picture": ([("user", BENIGN)], []),
    "chat": ([("user", RISKY), ("assistant", "yes"), ("user", BENIGN)], ["0.png"]),
    "answered": ([("user", BENIGN), ("assistant", "The answer is yes."), ("user", "Is it yes?")], ["0.png"]),
}
POLICIES = ["default", "paper", "off"]


def tiny_base():
    """Every width is at least 64, the block size of bitsandbytes' 4-bit weights."""
    torch.manual_seed(0)
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=64,
            intermediate_size=64,
            num_hidden_layers=1,
            num_attention_heads=4,
            image_size=32,
            patch_size=8,
        ),
        text_config=LlamaConfig(
            hidden_size=64,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=4,
            vocab_size=330,
            max_position_embeddings=512,
            initializer_range=0.2,
        ),
        image_token_index=3,
        vision_feature_layer=-1,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    model = LlavaForConditionalGeneration(config).eval()
    model.generation_config = GenerationConfig(pad_token_id=0, bos_token_id=1, eos_token_id=2, max_new_tokens=8)
    return model


def inputs_of(processor, turns, pictures):
    from PIL import Image

    messages = [{"role": role, "content": [{"type": "text", "text": text}]} for role, text in turns]
    messages[0]["content"] = [{"type": "image"} for _ in pictures] + messages[0]["content"]
    prompt = processor.apply_chat_template(messages, add_generation_prompt=True)
    images = [Image.open(HERE / name) for name in pictures]
    return processor(images=images or None, text=[prompt], return_tensors="pt")


def results(model, processor) -> dict:
    """Verdict and answers (token ids) of every chat."""
    found = {}
    for name, (turns, pictures) in CHATS.items():
        inputs = inputs_of(processor, turns, pictures)
        length = inputs["input_ids"].shape[1]
        found[name] = {
            "verdict": model.assess(**inputs).to_list()[0],
            "answers": {
                policy: model.generate(**inputs, safety_policy=policy, max_new_tokens=80)[0, length:].tolist()
                for policy in POLICIES
            },
        }
    return found


def main():
    if (HERE / "expected.json").exists():
        sys.exit("These models were saved by commit 5c91370; today's code would save others.")
    torch.set_num_threads(1)
    for seed, name in enumerate(PICTURES):
        picture(seed).save(HERE / name)
    processor = SafeVlmProcessor.from_base(tiny_processor())
    model = judging_model(safe_model(tiny_base(), processor, safety_hidden_size=24), processor)
    model.save_pretrained(HERE / "full")
    processor.save_pretrained(HERE / "full")
    model.save_safety_adapter(HERE / "adapter")
    expected = {"full": results(SafeVlmForConditionalGeneration.from_pretrained(HERE / "full"), processor)}
    for name, config in {
        "full_8bit": BitsAndBytesConfig(load_in_8bit=True),
        "full_4bit": BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4"),
    }.items():
        quantized = SafeVlmForConditionalGeneration.from_pretrained(HERE / "full", quantization_config=config)
        quantized.save_pretrained(HERE / name)
        expected[name] = results(SafeVlmForConditionalGeneration.from_pretrained(HERE / name), processor)
    for folder in ("adapter", "full_8bit", "full_4bit"):
        for code in (HERE / folder).glob("*.py"):  # the same as in `full`
            code.unlink()
    (HERE / "expected.json").write_text(json.dumps(expected) + "\n")


if __name__ == "__main__":
    main()
