"""From a row to tensors: token ids, labels on the answers only, what the safety head may read.

A row is encoded with the same template, processor and hint placement as at inference. `encoded_datasets.py` does it
for whole data sets.
"""

import hashlib
from collections.abc import Mapping

import torch

from safevlm.policy_texts import saved_token_ids
from safevlm.processing.chat_prompt import ChatPrompt
from safevlm.prompt import hint_column
from safevlm.safety_modules import IGNORE_INDEX
from safevlm.safety_policy import ACTIONS, SafetyPolicy
from safevlm.trainer.data import DataError, SafetyRow, row_from_record

# What the processor returns beside `input_ids`, in its shape; 0 is neither question nor image.
PER_TOKEN = ("safety_question_mask", "token_type_ids", "mm_token_type_ids")


class EncodedRow(dict):
    """A row's tensors (see `encode_row`), and which row it is."""

    row_id: str


class RowEncoder:
    """
    Encodes one row after the other.

    Args:
        processor (`SafeVlmProcessor`)
        config (`SafeVlmConfig`): The model's: its labels, and its policy, which writes the hints.
        hint_probability (`float` in [0, 1]): Share of risky rows that carry the hint for their label. Which ones
            depends on `seed` and the row's index only, so that an interrupted run resumes with the same rows.
        max_length (`int`, *optional*): Longer rows raise `DataError`.
    """

    def __init__(self, processor, config, hint_probability=0.0, max_length=None, seed=0):
        self.processor = processor
        self.config = config
        self.labels = config.labels
        self.policy = SafetyPolicy.from_value(config.safety_policy)
        self.actions = self.policy.action_table(self.labels)
        self.hint_probability = hint_probability
        self.max_length = max_length
        self.seed = seed

    def example(self, row, index: int) -> SafetyRow:
        """The row, checked. Raises `DataError` where it breaks the schema or has labels that the model does not."""
        if isinstance(row, Mapping):
            return row_from_record(row, self.labels, row_id=str(index))
        if not isinstance(row, SafetyRow):
            raise DataError(
                f"row {index}: expected a dict with `messages` and `images`, or a SafetyRow, got {type(row).__name__}."
            )
        for name, names in (("category", self.config.category_names), ("level", self.config.level_names)):
            if (label := getattr(row, name)) is not None and label >= len(names):
                raise DataError(f"row {row.row_id!r}: `{name}` {label} is not one of the model's {len(names)}.")
        return row

    def encode(self, example: SafetyRow, index: int) -> EncodedRow:
        row = EncodedRow(encode_row(example, self.processor, self.config, hint=self._hint(example, index)))
        row.row_id = example.row_id
        if self.max_length is not None and len(row["input_ids"]) > self.max_length:
            raise DataError(
                f"row {example.row_id!r}: {len(row['input_ids'])} tokens, `max_length` is {self.max_length}; "
                f"raise `max_length` or shorten the row."
            )
        return row

    def _hint(self, example: SafetyRow, index: int) -> list[int] | None:
        if example.category is None or example.level is None or not self._chance(index):
            return None
        action = ACTIONS[self.actions[example.category, example.level]]
        text = self.policy.hint(action, self.labels.category_names[example.category])
        return None if text is None else saved_token_ids(self.config)[text]

    def _chance(self, index: int) -> bool:
        """True for a fixed `hint_probability` of all indices."""
        digest = hashlib.sha256(f"{self.seed}:{index}".encode()).digest()
        return int.from_bytes(digest[:8], "big") < self.hint_probability * 2**64


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
