"""A tiny random LLaVA with its real processor class, built offline in milliseconds."""

import copy
import json
from pathlib import Path

import torch
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    GenerationConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

from safevlm import SafeVlmForConditionalGeneration

VISION = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, patch_size=8)
TEXT = dict(
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    initializer_range=0.2,  # far from uniform logits, so that a change in the input changes the answer
)
TOKEN_IDS = dict(pad_token_id=0, bos_token_id=1, eos_token_id=2)
CHAT_TEMPLATE = (
    "{% for m in messages %}"
    "{% if m['role'] == 'assistant' %}ASSISTANT:{% for p in m['content'] %} {{ p['text'] }}{% endfor %}</s>"
    "{% else %}{{ m['role'] | upper }}: {% for p in m['content'] %}"
    "{% if p['type'] == 'image' %}<image>\n{% else %}{{ p['text'] }} {% endif %}{% endfor %}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)


def tiny_tokenizer(special_tokens=("<image>",), **named_tokens) -> PreTrainedTokenizerFast:
    """A byte-level BPE. Ids 0, 1 and 2 are padding, begin and end; `special_tokens` and `named_tokens` follow."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<pad>", "<s>", "</s>", *special_tokens, *named_tokens.values()],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["USER: What is in the picture? ASSISTANT: The answer is yes."] * 3, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        padding_side="left",
        extra_special_tokens=named_tokens,
    )


def tiny_processor(image_size: int = 32, patch_size: int = 8) -> LlavaProcessor:
    size = {"height": image_size, "width": image_size}
    return LlavaProcessor(
        image_processor=CLIPImageProcessorPil(size={"shortest_edge": image_size}, crop_size=size),
        tokenizer=tiny_tokenizer(),
        patch_size=patch_size,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=CHAT_TEMPLATE,
    )


def tiny_llava(seed: int = 0, vocab_size: int = 384, tie: bool = False) -> LlavaForConditionalGeneration:
    torch.manual_seed(seed)
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**VISION, image_size=32),
        text_config=LlamaConfig(**TEXT, vocab_size=vocab_size, max_position_embeddings=512, tie_word_embeddings=tie),
        image_token_index=3,
        vision_feature_layer=-2,
        **TOKEN_IDS,
        tie_word_embeddings=tie,
    )
    model = LlavaForConditionalGeneration(config).eval()
    model.generation_config = GenerationConfig(**TOKEN_IDS, max_new_tokens=8)
    return model


def picture(seed: int = 0, size: tuple[int, int] = (32, 32)) -> Image.Image:
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(0, 256, (size[1], size[0], 3), generator=generator, dtype=torch.uint8)
    return Image.fromarray(pixels.numpy())


def chat(question: str = "What is in the picture?", images: int = 1) -> list[dict]:
    content = [{"type": "image"} for _ in range(images)] + [{"type": "text", "text": question}]
    return [{"role": "user", "content": content}]


RISK, NO_RISK = (1, 3), (6, 0)  # ids of category and level in the paper's labels: illegal risk, high; safe, none


def psa_vlm_record(row_id: str, image: str, labels=NO_RISK, question="Is it?", answer="yes", /, **changes) -> dict:
    """A training row in the format of PSA-VLM. `labels` are ids of category and level; `changes` replace fields."""
    turns = [{"from": "USER", "value": f"<image>\n{question}"}, {"from": "ASSISTANT", "value": answer}]
    record = {"id": row_id, "image": image, "conversations": turns, "safe_type": labels[0], "safe_level": labels[1]}
    return {**record, **changes}


def write_jsonl(path: Path, records: list[dict]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def write_rows(folder: Path, count: int = 6) -> Path:
    """Writes pictures and a training file about them, every other row of high risk; returns the file."""
    for i in range(count):
        picture(i).save(folder / f"{i}.png")
    records = [psa_vlm_record(str(i), f"{i}.png", RISK if i % 2 else NO_RISK) for i in range(count)]
    return write_jsonl(folder / "rows.jsonl", records)


LEVELS = ("none", "low", "medium", "high")
SIZES = dict(safety_hidden_size=32, num_safety_features=4, num_attention_heads=4, num_head_tokens=2)


def safe_model(base, processor, seed: int = 0, **safety) -> SafeVlmForConditionalGeneration:
    """A SafeVLM over a tiny base, with safety embeddings large enough to change answers."""
    torch.manual_seed(seed)
    model = SafeVlmForConditionalGeneration.from_base(base, processor, **{**SIZES, **safety})
    if model.safety.embeddings is not None:
        with torch.no_grad():
            for parameter in model.safety.embeddings.parameters():
                parameter.normal_(std=1.0)
    return model.eval()


def encode(processor, questions: list[str], images: list[int], seed: int = 0, **kwargs):
    """A batch of prompts with `images[i]` pictures in row i; the pictures' seeds count up from `seed`."""
    pictures = [picture(seed + i) for i in range(sum(images))]
    prompts = [
        processor.apply_chat_template(chat(question, n), add_generation_prompt=True)
        for question, n in zip(questions, images, strict=True)
    ]
    return processor(images=pictures or None, text=prompts, return_tensors="pt", padding=True, **kwargs)


def force_verdicts(monkeypatch, model, levels: list[int], category: str):
    """Makes the safety head certain of one level per row, in rows with an image."""
    predict_safety = model.predict_safety
    names = model.config.category_names

    def predict(*args, **kwargs):
        reading = predict_safety(*args, **kwargs)
        wanted = torch.tensor(levels, device=reading.level_logits.device)[reading.rows]
        category_ids = torch.where(wanted > 0, names.index(category), model.config.labels.safe_category_id)
        reading.level_logits = 20.0 * torch.nn.functional.one_hot(wanted, len(model.config.level_names))
        reading.category_logits = 20.0 * torch.nn.functional.one_hot(category_ids, len(names))
        return reading

    monkeypatch.setattr(model, "predict_safety", predict)


RISKY, BENIGN = "How do I use this against someone?", "What is in the picture?"


def judging_model(model, processor) -> SafeVlmForConditionalGeneration:
    """A copy of `model` whose head finds `RISKY` about `picture()` a high risk (politics), and `BENIGN` safe."""
    model = copy.deepcopy(model)
    head, pooled = model.safety.head, []
    hook = head.level_classifier.register_forward_pre_hook(lambda module, args: pooled.append(args[0][0]))
    for question in (RISKY, BENIGN):
        model.assess(**encode(processor, [question], [1]))
    hook.remove()
    direction = pooled[0] - pooled[1]
    direction = 40 * direction / direction.norm() ** 2
    middle = direction @ (pooled[0] + pooled[1]) / 2
    levels, categories = model.config.level_names, model.config.category_names
    with torch.no_grad():
        for classifier, names, risky, benign in (
            (head.level_classifier, levels, "high", "none"),
            (head.category_classifier, categories, "politics", "safe"),
        ):
            classifier.weight.zero_(), classifier.bias.zero_()
            for name, sign in ((risky, 1), (benign, -1)):
                classifier.weight[names.index(name)] = sign * direction
                classifier.bias[names.index(name)] = -sign * middle
    return model


def new_tokens(sequences: torch.Tensor, inputs) -> torch.Tensor:
    return sequences[:, inputs["input_ids"].shape[1] :]


def answers(processor, sequences: torch.Tensor, inputs) -> list[str]:
    """The answers as a user would read them."""
    return processor.batch_decode(new_tokens(sequences, inputs), skip_special_tokens=True)
