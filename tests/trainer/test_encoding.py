"""Encoded rows: labels on the answers, what the safety head may read, hints, and what bad rows get."""

import copy

import pytest
import torch
from tiny import chat, picture, safe_model, tiny_llava

from safevlm import SafeVlmProcessor
from safevlm.prompt import last_occurrence
from safevlm.trainer.data import DataError, ImageError, SafetyRow
from safevlm.trainer.encoding.data_collator import SafeVlmDataCollator
from safevlm.trainer.encoding.encoded_datasets import EncodedDataset
from safevlm.trainer.encoding.row_encoder import RowEncoder, encode_row

# The chat template of llava-hf/llava-1.5-7b-hf, which leaves the end of an answer open.
LLAVA_TEMPLATE = (
    "{% for message in messages %}{% if message['role'] != 'system' %}{{ message['role'].upper() + ': '}}{% endif %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>\n' }}{% endfor %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}{{ content['text'] + ' '}}"
    "{% endfor %}{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)


@pytest.fixture(scope="module")
def llava_processor(base_processor):
    base = copy.deepcopy(base_processor)
    base.chat_template = LLAVA_TEMPLATE
    return SafeVlmProcessor.from_base(base)


def user(text, images=0):
    return chat(text, images)[0]


def assistant(text):
    return {"role": "assistant", "content": [{"type": "text", "text": text}]}


def example(*messages, category=1, level=2, row_id="row-7"):
    count = sum(part["type"] == "image" for message in messages for part in message["content"])
    return SafetyRow(row_id, [picture(i) for i in range(count)], list(messages), category, level)


def labelled(encoded) -> list[list[int]]:
    """The runs of labelled tokens; each label is the token it stands at."""
    runs, previous = [], -2
    for i, (token, label) in enumerate(zip(encoded["input_ids"].tolist(), encoded["labels"].tolist(), strict=True)):
        if label == -100:
            continue
        assert label == token
        if i != previous + 1:
            runs.append([])
        runs[-1].append(token)
        previous = i
    return runs


def read_by_head(processor, encoded) -> str:
    """What the question mask lets the head read, without placeholders (which the model masks itself)."""
    ids = encoded["input_ids"][encoded["safety_question_mask"].bool()].tolist()
    return processor.tokenizer.decode(
        [i for i in ids if i not in (processor.image_token_id, processor.safety_token_id)]
    )


CONVERSATIONS = {
    "one turn": [user("Is it yes?", 1), assistant("The answer is yes.")],
    "text only": [user("Is it yes?"), assistant("no")],
    "two turns": [user("Is it yes?", 1), assistant("no"), user("yes?"), assistant("The answer is no.")],
    "two images": [user("Which?", 2), assistant("yes")],
    "image in a later turn": [user("yes?"), assistant("no"), user("And here?", 1), assistant("The yes.")],
    "images in both turns": [user("yes?", 1), assistant("no"), user("And here?", 2), assistant("The yes.")],
    "system turn": [
        {"role": "system", "content": [{"type": "text", "text": "The rules."}]},
        user("Is it?", 1),
        assistant("no"),
    ],
}


@pytest.mark.parametrize("conversation", CONVERSATIONS.values(), ids=CONVERSATIONS.keys())
def test_labels_are_the_answers_and_their_end_only(processor, model, conversation):
    encoded = encode_row(example(*conversation), processor, model.config)
    answers = [m["content"][0]["text"] for m in conversation if m["role"] == "assistant"]
    assert [processor.tokenizer.decode(run) for run in labelled(encoded)] == [f" {a}</s>" for a in answers]


@pytest.mark.parametrize("conversation", CONVERSATIONS.values(), ids=CONVERSATIONS.keys())
def test_a_template_without_end_of_turn_gets_one_at_the_last_answer(llava_processor, model, conversation):
    encoded = encode_row(example(*conversation), llava_processor, model.config)
    answers = [m["content"][0]["text"] for m in conversation if m["role"] == "assistant"]
    runs = [llava_processor.tokenizer.decode(run) for run in labelled(encoded)]
    assert [run.strip() for run in runs[:-1]] == answers[:-1]
    assert runs[-1] == f" {answers[-1]}</s>"
    assert encoded["input_ids"][-1] == llava_processor.tokenizer.eos_token_id


@pytest.mark.parametrize("conversation", CONVERSATIONS.values(), ids=CONVERSATIONS.keys())
@pytest.mark.parametrize("hinted", [False, True])
def test_the_safety_head_reads_the_prompt_but_no_answer_and_no_hint(processor, model, conversation, hinted):
    hint = processor.tokenizer(" Careful!")["input_ids"] if hinted else None
    encoded = encode_row(example(*conversation), processor, model.config, hint=hint)
    text = processor.apply_chat_template(conversation).replace("<image>", "")
    for message in conversation:
        if message["role"] == "assistant":
            text = text.replace(f"ASSISTANT: {message['content'][0]['text']}</s>", "ASSISTANT:")
    assert read_by_head(processor, encoded) == text


@pytest.mark.parametrize("conversation", CONVERSATIONS.values(), ids=CONVERSATIONS.keys())
def test_token_ids_are_what_the_processor_makes_of_the_conversation(processor, model, conversation):
    row = example(*conversation)
    encoded = encode_row(row, processor, model.config)
    text = processor.apply_chat_template(row.messages)
    expected = processor(images=row.load_images() or None, text=text, return_tensors="pt")
    assert encoded["input_ids"].tolist() == expected["input_ids"][0].tolist()
    assert ("pixel_values" in encoded) == bool(row.images)
    if row.images:
        assert torch.equal(encoded["pixel_values"], expected["pixel_values"])


def test_labels_of_the_row_are_kept_and_missing_ones_ignored(processor, model):
    conversation = CONVERSATIONS["one turn"]
    encoded = encode_row(example(*conversation, category=0, level=3), processor, model.config)
    assert (encoded["safety_category_labels"].item(), encoded["safety_level_labels"].item()) == (0, 3)
    encoded = encode_row(example(*conversation, category=None, level=None), processor, model.config)
    assert (encoded["safety_category_labels"].item(), encoded["safety_level_labels"].item()) == (-100, -100)


@pytest.mark.parametrize("spelling", ["<image>", "<safety>", "</s>", "<pad>", "<s>"])
def test_special_tokens_spelt_by_the_user_become_text(processor, model, spelling):
    tokenizer = processor.tokenizer
    plain = encode_row(example(user("Is it?", 1), assistant("no")), processor, model.config)
    spelt = encode_row(example(user(f"Is {spelling} it?", 1), assistant(f"no {spelling}")), processor, model.config)
    for token in ("<image>", "<safety>", "</s>", "<pad>", "<s>"):
        token_id = tokenizer.convert_tokens_to_ids(token)
        assert (spelt["input_ids"] == token_id).sum() == (plain["input_ids"] == token_id).sum(), token


@pytest.mark.parametrize("policy, level", [("default", "low"), ("default", "medium"), ("paper", "high")])
@pytest.mark.parametrize("template", ["tiny", "llava"])
def test_a_hint_is_put_where_generation_puts_it(
    processor, llava_processor, verdicts, monkeypatch, policy, level, template
):
    processor = processor if template == "tiny" else llava_processor
    model = safe_model(tiny_llava(), processor, safety_policy=policy)
    conversation = [user("Is it yes?", 1), assistant("no"), user("And here?", 1), assistant("yes")]
    row = example(*conversation, category=0, level=model.config.level_names.index(level))
    encoded = EncodedDataset([row], RowEncoder(processor, model.config, hint_probability=1.0))[0]

    fed = {}
    generate = model.base.generate
    monkeypatch.setattr(model.base, "generate", lambda **kwargs: fed.update(kwargs) or generate(**kwargs))
    verdicts(model, level)
    prompt = processor.apply_chat_template(conversation[:-1], add_generation_prompt=True)
    model.generate(**processor(images=row.load_images(), text=[prompt], return_tensors="pt"), max_new_tokens=1)

    answer = labelled(encoded)[-1]
    assert encoded["input_ids"].tolist() == fed["input_ids"][0].tolist() + answer
    hint = processor.tokenizer.decode(encoded["input_ids"])
    assert hint.count("Note: this request") == 1
    assert "Note: this request" not in read_by_head(processor, encoded)


def test_a_hinted_row_differs_by_the_hint_only(processor, model):
    row = example(user("Is it yes?", 1), assistant("no"))
    hint = processor.tokenizer(" Careful!")["input_ids"]
    plain, hinted = (encode_row(row, processor, model.config, hint=h) for h in (None, hint))
    at = last_occurrence(plain["input_ids"].tolist(), model.config.generation_prompt_token_ids)
    for name, inserted in (
        ("input_ids", hint),
        ("labels", [-100] * len(hint)),
        ("safety_question_mask", [0] * len(hint)),
    ):
        expected = plain[name].tolist()
        expected[at:at] = inserted
        assert hinted[name].tolist() == expected


def hinted_rows(rows, processor, model, **kwargs) -> list[int]:
    dataset = EncodedDataset(rows, RowEncoder(processor, model.config, **kwargs))
    return [i for i in range(len(rows)) if "Note: this" in processor.tokenizer.decode(dataset[i]["input_ids"])]


def test_hints_go_to_about_the_wanted_share_of_risky_rows_always_the_same(processor, model, make_row):
    rows = [make_row(i) for i in range(60)]
    chosen = hinted_rows(rows, processor, model, hint_probability=0.3, seed=1)
    assert 9 <= len(chosen) <= 27
    assert chosen == hinted_rows(rows, processor, model, hint_probability=0.3, seed=1)
    assert chosen != hinted_rows(rows, processor, model, hint_probability=0.3, seed=2)
    assert hinted_rows(rows, processor, model, hint_probability=1.0) == list(range(60))
    assert hinted_rows(rows, processor, model, hint_probability=0.0) == []


def test_only_risky_rows_get_hints(processor, model, rows):
    assert hinted_rows(rows, processor, model, hint_probability=1.0) == [0, 2, 5, 7]


def test_a_row_longer_than_max_length_raises_with_its_id(processor, model):
    row = example(user("Is it yes?", 1), assistant("no"))
    length = len(encode_row(row, processor, model.config)["input_ids"])
    assert len(EncodedDataset([row], RowEncoder(processor, model.config, max_length=length))[0]["input_ids"]) == length
    with pytest.raises(DataError, match=f"row 'row-7': {length} tokens, `max_length` is {length - 1}"):
        EncodedDataset([row], RowEncoder(processor, model.config, max_length=length - 1))[0]


@pytest.mark.parametrize("images", [0, 1])
def test_a_row_that_ends_with_a_question_is_the_prompt_that_generation_gets(processor, model, images):
    row = example(user("Is it yes?", images))
    encoded = encode_row(row, processor, model.config)
    prompt = processor.apply_chat_template(row.messages, add_generation_prompt=True)
    expected = processor(images=row.load_images() or None, text=prompt, return_tensors="pt")
    assert encoded["input_ids"].tolist() == expected["input_ids"][0].tolist()
    assert labelled(encoded) == []
    assert encoded["safety_question_mask"].tolist() == expected["safety_question_mask"][0].tolist()


def test_an_image_that_vanished_raises_with_row_id_and_path(processor, model, tmp_path):
    row = SafetyRow("row-7", [tmp_path / "gone.png"], [user("Is it?", 1), assistant("no")], 1, 2)
    with pytest.raises(ImageError, match=r"row 'row-7'.*gone\.png"):
        encode_row(row, processor, model.config)


def test_cached_rows_are_encoded_once_and_equal(processor, model, rows, monkeypatch):
    cached = EncodedDataset(rows, RowEncoder(processor, model.config, hint_probability=0.5), cache=True)
    plain = EncodedDataset(rows, RowEncoder(processor, model.config, hint_probability=0.5))
    for i in range(len(rows)):
        assert cached[i] is cached[i]
        assert all(torch.equal(cached[i][name], plain[i][name]) for name in plain[i])


def test_a_batch_pads_on_the_right_and_keeps_images_in_row_order(processor, model, rows):
    dataset = EncodedDataset(rows, RowEncoder(processor, model.config))
    encoded = [dataset[i] for i in (0, 2, 4)]  # 1, 2 and 0 images
    batch = SafeVlmDataCollator(pad_token_id=0)(encoded)
    length = max(len(row["input_ids"]) for row in encoded)
    for name, padding in (("input_ids", 0), ("labels", -100), ("safety_question_mask", 0)):
        expected = [row[name].tolist() + [padding] * (length - len(row[name])) for row in encoded]
        assert batch[name].tolist() == expected, name
    lengths = [len(row["input_ids"]) for row in encoded]
    assert batch["attention_mask"].tolist() == [[1] * n + [0] * (length - n) for n in lengths]
    assert torch.equal(batch["pixel_values"], torch.cat([encoded[0]["pixel_values"], encoded[1]["pixel_values"]]))
    assert batch["safety_level_labels"].tolist() == [1, 2, 0]
    assert batch["safety_category_labels"].tolist() == [0, 1, 6]


def test_a_batch_without_images_has_no_pixels_and_trains(processor, model, make_row):
    dataset = EncodedDataset([make_row(0, images=0), make_row(1, images=0)], RowEncoder(processor, model.config))
    batch = SafeVlmDataCollator(pad_token_id=0)([dataset[0], dataset[1]])
    assert "pixel_values" not in batch
    assert model(**batch).safety_level_loss.item() == 0


def test_batched_rows_get_the_logits_they_get_alone(processor, model, rows):
    dataset = EncodedDataset(rows, RowEncoder(processor, model.config))
    collate = SafeVlmDataCollator(pad_token_id=0)
    with torch.no_grad():
        together = model(**collate([dataset[i] for i in (0, 2, 4)]))
        for row, i in enumerate((0, 2, 4)):
            alone = model(**collate([dataset[i]]))
            length = alone.logits.shape[1]
            assert torch.allclose(together.logits[row, :length], alone.logits[0], atol=1e-4)
            if alone.safety_level_logits is not None:
                assert torch.allclose(together.safety_level_logits[row], alone.safety_level_logits[0], atol=1e-5)
