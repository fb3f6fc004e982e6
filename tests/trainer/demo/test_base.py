"""The demo's base: tokens of training and inference agree, and a smoke build saves a stock LLaVA that loads and
answers."""

import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor, LlavaProcessor, pipeline

from safevlm.trainer.demo.base.build import SPARE_ROWS, BaseRecipe, build_base, make_config
from safevlm.trainer.demo.base.packing import Packer
from safevlm.trainer.demo.base.tokenization import (
    CHAT_TEMPLATE,
    answer_text,
    make_processor,
    prompt_text,
    train_tokenizer,
)
from safevlm.trainer.demo.base.tower import to_pixel_values
from safevlm.trainer.demo.picture_world.examples import make_examples, render
from safevlm.trainer.demo.picture_world.scene import make_scenes

INSTRUCTIONS = [
    ("Note: you must refuse.", "I can't help with this request."),
    ("Note: be careful.", "Careful: I'd rather not."),
]
SMOKE = BaseRecipe(pictures=64, tower_steps=3, tower_batch=8, steps=3, pictures_per_step=4, dev_pictures=6)


@pytest.fixture(scope="module")
def examples():
    return make_examples("train", 300, seed=0)


@pytest.fixture(scope="module")
def processor(examples):
    texts = [prompt_text(e.question, with_image=False) + answer_text(e.answer) for e in examples]
    texts += [prompt_text("", i, with_image=False) + answer_text(a) for i, a in INSTRUCTIONS] * 2
    return make_processor(train_tokenizer(texts), image_size=64, patch_size=16)


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    return folder, build_base(folder, seed=0, instructions=INSTRUCTIONS, recipe=SMOKE, progress=False)


def _messages(question):
    return [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}]


def test_prompt_then_answer_gives_the_same_tokens_as_both_together(processor, examples):
    tokenizer = processor.tokenizer
    cases = [(e.question, "", e.answer) for e in examples] + [(examples[0].question, i, a) for i, a in INSTRUCTIONS]
    cases.append(("日本 naïve\n?", "", "'Quoted', 12 things."))
    for question, instruction, answer in cases:
        prompt, reply = prompt_text(question, instruction), answer_text(answer)
        apart = tokenizer(prompt).input_ids + tokenizer(reply, add_special_tokens=False).input_ids
        assert tokenizer(prompt + reply).input_ids == apart


@pytest.mark.parametrize("text", ["Grüße, 世界! 🎲", "a\tb\n\nc", "\x00\x7f", "zyxwv QWERTY 0123"])
def test_any_text_survives_the_round_trip(processor, text):
    ids = processor.tokenizer(text, add_special_tokens=False).input_ids
    assert processor.tokenizer.decode(ids) == text


def test_the_words_of_the_world_are_one_token_each(processor):
    for word in (" circle", " purple", " background", " knives", " shapes", " ASSISTANT"):
        assert len(processor.tokenizer(word, add_special_tokens=False).input_ids) == 1, word


def test_template_gives_the_prompt_of_training(processor, examples):
    question = examples[0].question
    assert processor.apply_chat_template(_messages(question), add_generation_prompt=True) == prompt_text(question)


def test_template_supports_system_and_several_turns(processor):
    messages = [
        {"role": "system", "content": [{"type": "text", "text": "Be brief."}]},
        *_messages("What is red?"),
        {"role": "assistant", "content": [{"type": "text", "text": "A star."}]},
        {"role": "user", "content": "And blue?"},
    ]
    assert processor.apply_chat_template(messages, add_generation_prompt=True) == (
        "Be brief. USER: <image>\nWhat is red? ASSISTANT: A star.</s>USER: And blue? ASSISTANT:"
    )


def test_embedding_table_has_spare_rows_and_a_multiple_of_64(processor):
    rows = make_config(processor.tokenizer).text_config.vocab_size
    assert rows % 64 == 0 and rows >= len(processor.tokenizer) + SPARE_ROWS


def test_training_pixels_equal_the_processors(processor):
    pixels = render(make_scenes("dev", 2, seed=0), seed=0)
    processed = processor.image_processor(list(pixels), return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(to_pixel_values(pixels), processed, atol=1e-5, rtol=0)


def test_packed_blocks_see_the_picture_and_themselves_only(processor):
    import random

    packer = Packer(processor.tokenizer, INSTRUCTIONS, BaseRecipe())
    batch = packer.batch(make_scenes("train", 2, seed=0), random.Random(0))
    mask, positions = batch["mask"][0, 0], batch["position_ids"][0]
    prefix = len(packer.before) + 16 + len(packer.after)
    starts = [i for i in range(prefix, len(positions)) if positions[i] == prefix]
    assert len(starts) >= 3
    second = starts[1]
    assert mask[second, :prefix].all() and mask[second, second]
    assert not mask[second, prefix:second].any() and not mask[second, second + 1 :].any()
    # A packed prompt and answer are the tokens of the same chat on its own.
    ids = torch.cat([torch.tensor(packer.after), batch["ids"][0][len(packer.after) :][: starts[1] - prefix]])
    text = processor.tokenizer.decode(ids)
    assert text.endswith("</s>") and " ASSISTANT:" in text
    alone = processor.tokenizer(f"USER: <image>{text}").input_ids
    assert alone == [*packer.before, processor.tokenizer.image_token_id, *ids.tolist()]


def test_only_answers_and_their_ends_are_labelled(processor):
    import random

    packer = Packer(processor.tokenizer, INSTRUCTIONS, BaseRecipe())
    batch = packer.batch(make_scenes("train", 1, seed=0), random.Random(0))
    labelled = processor.tokenizer.decode(batch["labels"][0][batch["labels"][0] != -100])
    assert "ASSISTANT" not in labelled and "?" not in labelled and labelled.endswith("</s>")


def test_smoke_build_saves_a_stock_llava(built):
    folder, report = built
    assert {"data", "tower", "features", "language model"} <= report.seconds.keys() == report.cpu_seconds.keys()
    assert (folder / "model.safetensors").exists() and (folder / "generation_config.json").exists()
    model, processor = AutoModelForImageTextToText.from_pretrained(folder), AutoProcessor.from_pretrained(folder)
    assert type(model).__name__ == "LlavaForConditionalGeneration" and isinstance(processor, LlavaProcessor)
    assert processor.chat_template == CHAT_TEMPLATE and processor.tokenizer.padding_side == "left"
    assert model.generation_config.eos_token_id == processor.tokenizer.eos_token_id
    example = make_examples("dev", 1, seed=0)[0]
    pipe = pipeline("image-text-to-text", model=model, processor=processor)
    messages = _messages(example.question)
    messages[0]["content"][0]["image"] = example.image
    out = pipe(text=messages, max_new_tokens=3, return_full_text=False)
    assert isinstance(out[0]["generated_text"], str)


def test_build_is_deterministic_and_leaves_the_global_random_state(built, tmp_path):
    state = torch.get_rng_state()
    build_base(tmp_path, seed=0, instructions=INSTRUCTIONS, recipe=SMOKE, progress=False)
    assert torch.equal(state, torch.get_rng_state())
    one, two = (AutoModelForImageTextToText.from_pretrained(f).state_dict() for f in (built[0], tmp_path))
    assert all(torch.equal(one[name], two[name]) for name in one)
