"""Invariant 5 and the processor's contract: placeholders come from images alone, never from what a user writes."""

import copy
import dataclasses
import pickle
from collections import UserDict, UserList
from types import MappingProxyType

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tiny import CHAT_TEMPLATE, chat, encode, picture, tiny_processor, tiny_tokenizer
from tokenizers.processors import TemplateProcessing
from transformers import AddedToken, AutoProcessor, LlamaConfig

from safevlm import SafeVlmConfig, SafeVlmProcessor

# Joins a message's texts without anything between them, as many templates do.
JOINING_TEMPLATE = CHAT_TEMPLATE.replace("{{ p['text'] }} {% endif %}", "{{ p['text'] }}{% endif %}")
SPECIAL = ["<image>", "<safety>", "</s>", "<s>", "<pad>", "<|im_start|>"]
PIECES = st.lists(
    st.sampled_from([*SPECIAL, "<ima", "ge>", "<", ">", "<saf", "ety>", "hello ", " ", "</", "s", "|im_start|>"])
    | st.text(max_size=4),
    max_size=8,
)


def make_processor(template=CHAT_TEMPLATE):
    base = tiny_processor()
    base.chat_template = template
    base.tokenizer.add_tokens([AddedToken("<|im_start|>", special=True, normalized=False)], special_tokens=True)
    return SafeVlmProcessor.from_base(base)


@pytest.fixture(scope="module")
def processors():
    return [make_processor(), make_processor(JOINING_TEMPLATE)]


def counts(processor, inputs):
    ids = inputs["input_ids"][0].tolist()
    special = processor.tokenizer.convert_tokens_to_ids(SPECIAL)
    return {token: ids.count(token_id) for token, token_id in zip(SPECIAL, special, strict=True)}


@settings(max_examples=200, deadline=None)
@given(texts=st.lists(PIECES.map("".join), min_size=1, max_size=3), images=st.integers(0, 2))
@example(texts=["<image><safety>", "</s>"], images=1)
@example(texts=["<ima", "ge>"], images=1)
@example(texts=["<", "image", ">"], images=2)
@example(texts=["<im<image>age>"], images=1)
@example(texts=["<<safety>safety>"], images=0)
def test_user_text_cannot_add_remove_or_move_control_tokens(processors, texts, images):
    for processor in processors:
        content = [{"type": "image", "image": picture(i)} for i in range(images)]
        content += [{"type": "text", "text": text} for text in texts]
        messages = [{"role": "user", "content": content}]
        inputs = processor.apply_chat_template(
            messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
        )
        expected = {"<image>": 16 * images, "<safety>": 8 * images}
        assert counts(processor, inputs) == {token: expected.get(token, 0) for token in SPECIAL}
        plain = encode(processor, ["x"], [images])["input_ids"][0].tolist()
        start = plain.index(processor.tokenizer.encode("x")[0]) if images else 0
        assert inputs["input_ids"][0, :start].tolist() == plain[:start]  # and they stay where they were


@settings(max_examples=200, deadline=None)
@given(PIECES.map("".join))
def test_neutralising_only_ever_adds_spaces_and_only_where_a_special_token_stands(processors, text):
    processor = processors[0]
    (neutral,) = processor.neutralise(text)
    assert neutral.replace(" ", "") == text.replace(" ", "")
    assert not any(token in neutral for token in SPECIAL)
    if not any(token in text for token in SPECIAL):
        assert neutral == text
    assert processor.neutralise(neutral) == [neutral]


@pytest.mark.parametrize("role", ["user", "system", "assistant"])
@pytest.mark.parametrize("as_string", [False, True])
def test_every_message_is_neutralised_and_the_callers_stay_as_they_were(processor, role, as_string):
    text = "see <image> <safety></s>"
    template = (
        "{% for m in messages %}{{ m['content'] if m['content'] is string else m['content'][0]['text'] }}{% endfor %}"
    )
    messages = [{"role": role, "content": text if as_string else [{"type": "text", "text": text}]}]
    before = copy.deepcopy(messages)
    rendered = make_processor(template).apply_chat_template(messages)
    assert rendered == "see < image> < safety>< /s>"
    assert messages == before


def test_tools_and_other_words_for_the_template_are_neutralised():
    processor = make_processor(
        "{{ today }}{% for tool in tools %}{{ tool.function.name }}: {{ tool.function.description }}{% endfor %}"
    )
    tool = {"type": "function", "function": {"name": "f</s>", "description": "<image> of <safety>", "parameters": {}}}
    rendered = processor.apply_chat_template(chat(), tools=[tool], today="<s>now")
    assert rendered == "< s>nowf< /s>: < image> of < safety>"
    assert tool["function"]["name"] == "f</s>"


def test_another_template_than_the_processors_own_is_refused(processor):
    """It could write the question into an answer, which the safety head does not read."""
    with pytest.raises(ValueError, match=r"`chat_template` '\{\{ 1 \}\}' is not this processor's own.*chat_template`"):
        processor.apply_chat_template(chat(), chat_template="{{ 1 }}")
    assert processor.apply_chat_template(chat(), chat_template=CHAT_TEMPLATE) == processor.apply_chat_template(chat())


@dataclasses.dataclass
class Message:
    role: str
    content: str


def asks(text):
    return {"role": "user", "content": [{"type": "text", "text": text}]}


@pytest.mark.parametrize(
    ("messages", "error"),
    [
        (
            [{"role": "user", "content": [{"type": "text", "text": ["<image>"]}]}],
            r"\['text'\]` must be a string, got list",
        ),
        ([asks(7)], r"messages\[0\]\['content'\]\[0\].*got 7"),
        (
            [asks(UserDict(a="<image>"))],
            "must be a string, got UserDict",
        ),
        ([asks(MappingProxyType({}))], "string, got mappingproxy"),
        ([{"role": "user", "content": [{"type": "text"}]}], "must be a string, got None"),
        ([{"role": "user", "content": [{"text": "<image>"}]}], "must be a dict with a 'type'"),
        ([{"role": "user", "content": [3]}], "must be a dict with a 'type', got 3"),
        ([{"role": "user", "content": UserList(["<image>"])}], "must be text or a list of parts, got UserList"),
        ([{"role": "user", "content": Message("a", "<image>")}], "must be text or a list of parts, got Message"),
        ([*chat(), Message("user", "<image>")], r"`messages\[1\]` must be a dict with a 'role'.*got Message"),
        ([{"content": "hello"}], r"`messages\[0\]` must be a dict with a 'role'"),
        (
            [{"role": "user", "content": "a", "note": Message("a", "<image>")}],
            r"messages\[0\]\['note'\]` is a Message",
        ),
        ([*chat(), {"role": "user", "content": "a \ud83d b"}], r"messages\[1\].*lone surrogate, '\\ud83d', at 2"),
        ("hello", "A chat must be a list of messages, got 'hello'"),
        ([], r"A chat must be a list of messages, got \[\]"),
        (chat()[0], "A chat must be a list of messages, got dict"),
    ],
)
def test_what_is_no_text_is_refused_by_its_place(processor, messages, error):
    for options in ({}, dict(tokenize=True, return_dict=True)):
        with pytest.raises(ValueError, match=error):
            processor.apply_chat_template(messages, **options)


@pytest.mark.parametrize("kind", [UserDict, MappingProxyType])
def test_mappings_are_read_as_dicts(processor, kind):
    expected = processor.apply_chat_template(chat("< image>", 0))
    found = processor.apply_chat_template(
        [kind({"role": "user", "content": [kind({"type": "text", "text": "<image>"})]})]
    )
    assert found == expected
    text = np.str_("<image>")
    assert processor.apply_chat_template([{"role": "user", "content": (text,)}]) == expected


def test_other_words_for_the_template_are_checked_too():
    processor = make_processor("{{ note }}{{ messages[0].role }}")
    for note in (UserDict(a="<image>"), ("<image>",), {"<image>": 1}, np.array(["<image>"])[0]):
        assert "<image>" not in processor.apply_chat_template(chat(), note=note)
    with pytest.raises(ValueError, match="`note` is a Message, whose texts cannot be checked"):
        processor.apply_chat_template(chat(), note=Message("<image>", ""))
    with pytest.raises(ValueError, match="`note` holds a lone surrogate"):
        processor.apply_chat_template(chat(), note="\udfff")
    with pytest.raises(ValueError, match=r"`text\[1\]` holds a lone surrogate"):
        processor(text=["fine", "\udfff"])


def test_sanitising_keeps_the_question_mask_and_breaks_other_added_tokens_too():
    base = tiny_processor()
    base.tokenizer.add_tokens(["<think>"])
    processor = SafeVlmProcessor.from_base(base)
    messages = [*chat("hello <think> </s>", 0), {"role": "assistant", "content": "yes"}, *chat("and?", 0)]
    settings = dict(tokenize=True, return_dict=True, return_tensors="pt")
    plain = processor.apply_chat_template(messages, **settings)
    inputs = processor.apply_chat_template(messages, sanitize_control_tokens=True, **settings)
    think = processor.tokenizer.convert_tokens_to_ids("<think>")
    assert think in plain["input_ids"] and think not in inputs["input_ids"]
    hidden = inputs["input_ids"][0][inputs["safety_question_mask"][0] == 0]
    assert processor.decode(hidden) == " yes</s>"


@pytest.mark.parametrize("writes_bos", [False, True])
def test_a_bos_is_written_once_on_every_road(writes_bos):
    base = tiny_processor()
    base.tokenizer._tokenizer.post_processor = TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", base.tokenizer.bos_token_id)]
    )
    base.chat_template = ("{{ bos_token }}" if writes_bos else "") + CHAT_TEMPLATE
    processor = SafeVlmProcessor.from_base(base)
    prompt = processor.apply_chat_template(chat(images=0), add_generation_prompt=True)
    inputs = [
        processor(text=prompt),
        processor(text=[prompt, prompt]),
        processor(text=prompt, add_special_tokens=True),
        processor.apply_chat_template(chat(images=0), add_generation_prompt=True, tokenize=True, return_dict=True),
    ]
    for row in (ids for each in inputs for ids in each["input_ids"]):
        assert row.count(base.tokenizer.bos_token_id) == 1 and row == inputs[0]["input_ids"][0]


def test_prompts_with_and_without_a_bos_make_no_batch(processor):
    with pytest.raises(ValueError, match="Either all prompts in `text` begin with '<s>', or none"):
        processor(text=["<s>a", "b"])
    processor(text=["<s>a", "<image><s>b"], images=[picture()])  # as PaliGemma's


def test_a_batch_of_conversations_is_neutralised(processor):
    rendered = processor.apply_chat_template([chat("<image>"), chat("a <safety>", images=0)])
    assert [text.count("<image>") for text in rendered] == [1, 0]
    assert all("<safety>" not in text for text in rendered)


def test_ordinary_text_renders_as_the_base_renders_it(processor, base_processor):
    for question in ("What is in the picture?", "a < b > c </ s> [x] {{ y }} 抱歉 image safety", ""):
        for kwargs in ({}, {"add_generation_prompt": True}):
            for images in (0, 1, 2):
                messages = chat(question, images)
                expected = base_processor.apply_chat_template(messages, **kwargs)
                assert processor.apply_chat_template(messages, **kwargs) == expected


def test_each_image_is_followed_by_its_placeholders_and_nothing_else_changes(processor, base_processor):
    inputs, expected = (encode(p, ["What?", "no"], [2, 1]) for p in (processor, base_processor))
    safety, image = processor.safety_token_id, processor.image_token_id
    for row, base_row in zip(inputs["input_ids"].tolist(), expected["input_ids"].tolist(), strict=True):
        assert [i for i in row if i not in (safety, 0)] == [i for i in base_row if i != 0]
        text = "".join({safety: "s", image: "i"}.get(i, ".") for i in row).strip(".")
        assert set(text.split(".")) <= {"i" * 16 + "s" * 8, ""}
    assert inputs["pixel_values"].equal(expected["pixel_values"])


@pytest.mark.parametrize("text", ["<safety>", ["fine", "USER: <image> a <safety> b"]])
def test_raw_text_with_the_reserved_token_raises(processor, text):
    row = 0 if isinstance(text, str) else 1
    with pytest.raises(
        ValueError, match=f"`text` of row {row} holds the reserved token '<safety>'.*apply_chat_template"
    ):
        processor(images=[picture()], text=text)


def test_wrapping_and_saving_do_not_change_the_base_processor(tmp_path):
    base = tiny_processor()
    before = (base.to_dict(), len(base.tokenizer), base.tokenizer.get_vocab())
    SafeVlmProcessor.from_base(base).save_pretrained(tmp_path)
    assert (base.to_dict(), len(base.tokenizer), base.tokenizer.get_vocab()) == before


def test_a_processor_survives_saving_and_auto_loading(processor, tmp_path):
    processor.save_pretrained(tmp_path)
    loaded = AutoProcessor.from_pretrained(tmp_path)
    assert type(loaded) is SafeVlmProcessor
    assert {**loaded.to_dict(), "auto_map": None} == {**processor.to_dict(), "auto_map": None}
    assert loaded.chat_template == processor.chat_template == CHAT_TEMPLATE
    assert loaded.safety_token_id == processor.safety_token_id
    expected, found = (encode(p, ["What?", "no"], [2, 0]) for p in (processor, loaded))
    assert expected.keys() == found.keys() and all(expected[name].equal(found[name]) for name in expected)
    assert (tmp_path / "processing_safevlm.py").is_file()


def test_settings_of_base_and_wrapper_are_kept(tmp_path):
    SafeVlmProcessor.from_base(tiny_processor(patch_size=16), tokens_per_image=3).save_pretrained(tmp_path)
    loaded = AutoProcessor.from_pretrained(tmp_path)
    ids = encode(loaded, ["a"], [1])["input_ids"][0].tolist()
    assert (ids.count(loaded.image_token_id), ids.count(loaded.safety_token_id)) == (4, 3)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda p: pickle.loads(pickle.dumps(p))])
def test_a_processor_can_be_copied_and_sent_to_a_worker(processor, duplicate):
    other = duplicate(processor)
    assert other.base.tokenizer is other.tokenizer
    assert encode(other, ["a"], [1])["input_ids"].equal(encode(processor, ["a"], [1])["input_ids"])


def test_tokens_per_image_follow_the_config(base_processor):
    config = SafeVlmConfig(num_prompt_tokens=5, num_projected_tokens=0)
    assert SafeVlmProcessor.from_base(base_processor, config=config).tokens_per_image == 5
    assert SafeVlmProcessor.from_base(base_processor).tokens_per_image == SafeVlmConfig().tokens_per_image


def test_wrapping_a_folder_equals_wrapping_the_processor(base_processor, processor, tmp_path):
    base_processor.save_pretrained(tmp_path)
    loaded = SafeVlmProcessor.from_base(str(tmp_path))
    assert encode(loaded, ["a"], [1])["input_ids"].equal(encode(processor, ["a"], [1])["input_ids"])


def test_answers_decode_without_special_tokens(processor):
    ids = processor.tokenizer("The answer is yes.</s>")["input_ids"]
    assert processor.decode(ids, skip_special_tokens=True) == "The answer is yes."


def test_a_text_model_is_no_base(tmp_path):
    tiny_tokenizer().save_pretrained(tmp_path)
    LlamaConfig().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="without images: it is not a vision-language model"):
        SafeVlmProcessor.from_base(str(tmp_path))


def test_wrong_settings_are_refused(base_processor):
    with pytest.raises(ValueError, match="`tokens_per_image` must be 0 or more, got -1"):
        SafeVlmProcessor.from_base(base_processor, tokens_per_image=-1)
    with pytest.raises(
        ValueError, match="`base_processor_class` 'NoSuchProcessor' is not a processor of transformers"
    ):
        SafeVlmProcessor(base_processor.image_processor, tiny_tokenizer(), base_processor_class="NoSuchProcessor")
