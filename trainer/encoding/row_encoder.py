"""From a row to tensors: token ids, labels on the answers only, and the tokens that the safety head may read.

A row is encoded with the same template, processor and hint placement as at inference. `encoded_datasets.py` encodes
whole data sets.
"""

import hashlib
from collections.abc import Mapping

import torch

from safevlm.model_policy import saved_token_ids
from safevlm.processing.chat_prompt import ChatPrompt
from safevlm.prompt import hint_column
from safevlm.safety_labels import IGNORE_INDEX
from safevlm.safety_policy import ACTIONS, SafetyPolicy
from safevlm.trainer.data import DataError, SafetyRow, row_from_record

# Outputs of the processor in the shape of `input_ids`. A 0 means neither question nor image.
PER_TOKEN = ("safety_question_mask", "token_type_ids", "mm_token_type_ids")


class EncodedRow(dict):
    """The tensors of a row (see `encode_row`), and its id."""

    row_id: str


class RowEncoder:
    """
    Checks and encodes single rows.

    Args:
        processor (`SafeVlmProcessor`)
        config (`SafeVlmConfig`): The model's. It has the labels, and the policy whose hints rows carry.
        hint_probability (`float` in [0, 1]): Share of risky rows that carry the hint for their label. Which ones
            depends only on `seed` and the row's index, so that a resumed run trains on the same rows.
        max_length (`int`, *optional*): Rows with more tokens raise `DataError`.
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

    def check(self, row, index: int) -> SafetyRow:
        """The row as a [`SafetyRow`]. Raises `DataError` if it breaks the schema, or the model lacks its labels."""
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

    def encode(self, row: SafetyRow, index: int) -> EncodedRow:
        """Raises `DataError` if the row cannot be encoded, or is too long."""
        encoded = EncodedRow(encode_row(row, self.processor, self.config, hint=self._hint(row, index)))
        encoded.row_id = row.row_id
        length = len(encoded["input_ids"])
        if self.max_length is not None and length > self.max_length:
            raise DataError(
                f"row {row.row_id!r}: {length} tokens, `max_length` is {self.max_length}; raise `max_length` or "
                f"shorten the row."
            )
        return encoded

    def _hint(self, row: SafetyRow, index: int) -> list[int] | None:
        """Token ids of the hint for the row's label, for the rows that carry one."""
        if row.category is None or row.level is None or not self._is_drawn(index):
            return None
        action = ACTIONS[self.actions[row.category, row.level]]
        text = self.policy.hint(action, self.labels.category_names[row.category])
        return None if text is None else saved_token_ids(self.config)[text]

    def _is_drawn(self, index: int) -> bool:
        """True for a share `hint_probability` of all indices, always the same ones."""
        digest = hashlib.sha256(f"{self.seed}:{index}".encode()).digest()
        return int.from_bytes(digest[:8], "big") < self.hint_probability * 2**64


def encode_row(row: SafetyRow, processor, config, hint: list[int] | None = None) -> dict[str, torch.Tensor]:
    """
    Encodes one row. A row that ends with a question has no answer to supervise; its labels train the safety head only.

    Args:
        hint (`list[int]`, *optional*): Token ids to insert before the newest question's generation prompt.

    Returns:
        `dict[str, torch.Tensor]`: `input_ids`, `labels` (-100 outside the answers), `safety_question_mask` (1 where
        the safety head may read) and the family's token types, of shape `(sequence_length,)`; the scalars
        `safety_level_labels` and `safety_category_labels` (-100: no label); the image tensors, whose first dimension
        is the row's images.
    """
    answered = row.messages[-1]["role"] == "assistant"
    images = row.load_images()
    tokenizer = processor.tokenizer
    text = processor.apply_chat_template(row.messages, add_generation_prompt=not answered)
    if answered:
        if not text.answers or text.answers[-1][1] < len(text.rstrip()):
            raise DataError(
                f"row {row.row_id!r}: the processor's chat template does not mark where the last answer is, so "
                f"it cannot be trained on; change the row's texts or `processor.chat_template`."
            )
        # White space after the last answer belongs to a turn that would follow.
        text = ChatPrompt(text.rstrip(), text.answers)
    inputs = processor(images=images or None, text=text, return_tensors="pt")
    inputs.pop("attention_mask", None)
    ids = inputs.pop("input_ids")[0].tolist()
    per_token = {name: inputs.pop(name)[0].tolist() for name in PER_TOKEN if name in inputs}
    is_question = per_token["safety_question_mask"]
    labels = [IGNORE_INDEX if question else i for i, question in zip(ids, is_question, strict=True)]
    answer_start = max(i for i, question in enumerate(is_question) if question) + 1
    # Some templates, such as LLaVA-1.5's, do not end the last answer.
    if answered and ids[-1] != tokenizer.eos_token_id:
        ids.append(tokenizer.eos_token_id)
        labels.append(tokenizer.eos_token_id)
        for values in per_token.values():
            values.append(0)

    if hint:
        column = hint_column(ids[:answer_start], is_question[:answer_start], config.generation_prompt_token_ids)
        ids[column:column] = hint
        labels[column:column] = [IGNORE_INDEX] * len(hint)
        for values in per_token.values():
            values[column:column] = [0] * len(hint)
    return {
        "input_ids": torch.tensor(ids),
        "labels": torch.tensor(labels),
        **{name: torch.tensor(values) for name, values in per_token.items()},
        "safety_level_labels": torch.tensor(IGNORE_INDEX if row.level is None else row.level),
        "safety_category_labels": torch.tensor(IGNORE_INDEX if row.category is None else row.category),
        **inputs,
    }
