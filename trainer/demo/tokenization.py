"""Tokenizer and processor of the demo's base: a byte-level BPE trained on the spot, in the LLaVA-1.5 chat form.

Byte level means that any user text encodes and nothing is unknown; the words of the picture world are one token each.
The answer starts with a space, which the pre-tokenizer keeps with the word after it, so `ids(prompt + answer) ==
ids(prompt) + ids(answer)` and training and inference see the same tokens.
"""

from collections.abc import Iterable

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import CLIPImageProcessorPil, LlavaProcessor, PreTrainedTokenizerFast

BOS, EOS, PAD, IMAGE = "<s>", "</s>", "<pad>", "<image>"

# As in LLaVA-1.5, but an answer ends in </s> without a space. Images come before the text of their message.
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['content'] is string %}"
    "{% set parts = [{'type': 'text', 'text': message['content']}] %}"
    "{% else %}{% set parts = message['content'] %}{% endif %}"
    "{% set texts = parts | selectattr('type', 'equalto', 'text') | map(attribute='text') | join(' ') %}"
    "{% if message['role'] == 'assistant' %}"
    "ASSISTANT:{% generation %}{{ ' ' + texts + eos_token }}{% endgeneration %}"
    "{% elif message['role'] == 'system' %}{{ texts + ' ' }}"
    "{% else %}USER: {% for part in parts if part['type'] == 'image' %}{{ '<image>\n' }}{% endfor %}{{ texts + ' ' }}"
    "{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)


def train_tokenizer(texts: Iterable[str], vocab_size: int = 2048) -> PreTrainedTokenizerFast:
    """Trains the tokenizer on `texts`. Words that occur twice or more become one token as long as `vocab_size`
    allows."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        special_tokens=[PAD, BOS, EOS, IMAGE],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[(BOS, tokenizer.token_to_id(BOS))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        extra_special_tokens={"image_token": IMAGE},
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )


def make_processor(tokenizer: PreTrainedTokenizerFast, image_size: int, patch_size: int) -> LlavaProcessor:
    """The stock LLaVA processor: pictures of any size are resized to `image_size` and normalised to [-1, 1]."""
    image_processor = CLIPImageProcessorPil(
        size={"height": image_size, "width": image_size},
        do_center_crop=False,
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
    )
    return LlavaProcessor(
        image_processor=image_processor,
        tokenizer=tokenizer,
        patch_size=patch_size,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,  # the tower's class token, which "default" drops again
        chat_template=CHAT_TEMPLATE,
    )


def prompt_text(question: str, instruction: str = "", with_image: bool = True) -> str:
    """What the chat template makes of one question, an instruction after it, and the generation prompt."""
    text = f"{question} {instruction}" if instruction else question
    return f"USER: {'<image>' + chr(10) if with_image else ''}{text} ASSISTANT:"


def answer_text(answer: str) -> str:
    """What the chat template makes of an answer; follows `prompt_text` without anything in between."""
    return f" {answer}{EOS}"
