"""Tokenizer and processor of the demo's base: a byte-level BPE trained on the spot, and the chat format of LLaVA-1.5.

At byte level any user text can be encoded. Each word of the picture world is one token. An answer starts with a space,
which the pre-tokenizer keeps with the next word. So `ids(prompt + answer) == ids(prompt) + ids(answer)`, and training
and inference see the same tokens.
"""

from collections.abc import Iterable

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import CLIPImageProcessorPil, LlavaProcessor, PreTrainedTokenizerFast

BOS, EOS, PAD, IMAGE = "<s>", "</s>", "<pad>", "<image>"

# As in LLaVA-1.5, but without a space before the </s> that ends an answer. A message's images precede its text.
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
    """Trains the tokenizer on `texts`. Words that occur twice become one token each, as `vocab_size` permits."""
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
        num_additional_image_tokens=1,  # the tower's class token, which "default" drops
        chat_template=CHAT_TEMPLATE,
    )


def prompt_text(question: str, instruction: str = "", with_image: bool = True) -> str:
    """A question and the instruction after it as the chat template renders them, with the generation prompt."""
    text = f"{question} {instruction}" if instruction else question
    return f"USER: {'<image>' + chr(10) if with_image else ''}{text} ASSISTANT:"


def answer_text(answer: str) -> str:
    """An answer as the chat template renders it, directly after `prompt_text`."""
    return f" {answer}{EOS}"
