"""From a row to tensors: token ids, labels on the answers only, what the safety head may read.

A row is encoded with the same template, processor and hint placement as at inference. `encoded_rows.py` does it for
whole data sets.
"""

import torch

from safevlm.losses import IGNORE_INDEX
from safevlm.processing.chat_prompt import ChatPrompt
from safevlm.prompt import hint_column

from .data import DataError, SafetyRow

# What the processor returns beside `input_ids`, in its shape; 0 is neither question nor image.
PER_TOKEN = ("safety_question_mask", "token_type_ids", "mm_token_type_ids")


def encode_row(example: SafetyRow, processor, config, hint: list[int] | None = None) -> dict[str, torch.Tensor]:
    """
    Encodes one row. One that ends with a question has no answer to supervise: its labels train the safety head alone.

    Args:
        hint (`list[int]`, *optional*): Token ids to put before the newest question's generation prompt.

    Returns:
        `input_ids`, `labels` (-100 outside the answers), `safety_question_mask` (1 where the safety head may read) and
        the family's token types, all of shape `(sequence_length,)`; `safety_level_labels` and
        `safety_category_labels`, scalars (-100: no label); and the image tensors, with a leading dimension over the
        row's images.
    """
    answered = example.messages[-1]["role"] == "assistant"
    images = example.load_images()
    tokenizer = processor.tokenizer
    text = processor.apply_chat_template(example.messages, add_generation_prompt=not answered)
    if answered:
        if not text.answers or text.answers[-1][1] < len(text.rstrip()):
            raise DataError(
                f"row {example.row_id!r}: the processor's chat template does not show where the last answer is, so it "
                f"cannot be trained on; change the row's texts or `processor.chat_template`."
            )
        # White space after the last answer is the template's for a turn to follow.
        text = ChatPrompt(text.rstrip(), text.answers)
    inputs = processor(images=images or None, text=text, return_tensors="pt")
    inputs.pop("attention_mask", None)
    ids = inputs.pop("input_ids")[0].tolist()
    # What there is to say about each token: whether the safety head may read it, the family's token types.
    per_token = {name: inputs.pop(name)[0].tolist() for name in PER_TOKEN if name in inputs}
    is_question = per_token["safety_question_mask"]
    labels = [IGNORE_INDEX if question else i for i, question in zip(ids, is_question, strict=True)]
    start = max(i for i, question in enumerate(is_question) if question) + 1  # of the last answer
    # Templates such as LLaVA-1.5's leave the end of the last answer open.
    if answered and ids[-1] != tokenizer.eos_token_id:
        ids.append(tokenizer.eos_token_id)
        labels.append(tokenizer.eos_token_id)
        for values in per_token.values():
            values.append(0)

    if hint:
        at = hint_column(ids[:start], is_question[:start], config.generation_prompt_token_ids)
        ids[at:at] = hint
        labels[at:at] = [IGNORE_INDEX] * len(hint)
        for values in per_token.values():
            values[at:at] = [0] * len(hint)
    return {
        "input_ids": torch.tensor(ids),
        "labels": torch.tensor(labels),
        **{name: torch.tensor(values) for name, values in per_token.items()},
        "safety_level_labels": torch.tensor(IGNORE_INDEX if example.level is None else example.level),
        "safety_category_labels": torch.tensor(IGNORE_INDEX if example.category is None else example.category),
        **inputs,
    }
