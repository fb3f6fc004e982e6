"""Data sets as people have them (lists, `datasets`, torch's; rows of dicts or `SafetyRow`s) as encoded rows."""

import hashlib
from collections.abc import Mapping

import torch

from safevlm.safety_policy import ACTIONS, SafetyPolicy

from .data import DataError, SafetyRow, row_from_record
from .encoding import encode_row


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
        for name, names in (("category", self.labels.category_names), ("level", self.labels.level_names)):
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
        return None if text is None else [int(i) for i in self.config.policy_token_ids[text].split()]

    def _chance(self, index: int) -> bool:
        """True for a fixed `hint_probability` of all indices."""
        digest = hashlib.sha256(f"{self.seed}:{index}".encode()).digest()
        return int.from_bytes(digest[:8], "big") < self.hint_probability * 2**64


class EncodedDataset(torch.utils.data.Dataset):
    """
    Encodes rows on access.

    Args:
        rows: What has a length and rows by index.
        encoder (`RowEncoder`)
        cache (`bool`): Keep encoded rows in memory.
    """

    def __init__(self, rows, encoder: RowEncoder, cache: bool = False):
        self.rows = rows
        self.encoder = encoder
        self._cache = {} if cache else None

    def __len__(self) -> int:
        return len(self.rows)

    def example(self, index: int) -> SafetyRow:
        """The row as it is before encoding."""
        return self.encoder.example(self.rows[index], index)

    def __getitem__(self, index: int) -> EncodedRow:
        if self._cache is not None and index in self._cache:
            return self._cache[index]
        encoded = self.encoder.encode(self.example(index), index)
        if self._cache is not None:
            self._cache[index] = encoded
        return encoded


class EncodedStream(torch.utils.data.IterableDataset):
    """Encodes the rows of an iterable that has no length. Problems of a row are found when it is reached."""

    def __init__(self, rows, encoder: RowEncoder):
        self.rows = rows
        self.encoder = encoder

    def __iter__(self):
        for index, row in enumerate(self.rows):
            yield self.encoder.encode(self.encoder.example(row, index), index)

    def set_epoch(self, epoch: int):
        """For data sets that shuffle anew in each epoch."""
        if hasattr(self.rows, "set_epoch"):
            self.rows.set_epoch(epoch)


def encode_rows(rows, encoder: RowEncoder, cache: bool = False):
    """
    Any data set as one of encoded rows; a dict of sets as a dict of those.

    Raises:
        `ValueError`: It has no rows to read, or can be read only once.
    """
    if rows is None or isinstance(rows, (EncodedDataset, EncodedStream)):
        return rows
    if isinstance(rows, dict):
        return {name: encode_rows(part, encoder, cache) for name, part in rows.items()}
    rows = _plain(rows)
    if hasattr(rows, "iloc"):
        raise ValueError(
            "A data set must be a list or a `datasets` or torch data set; of a table pass its rows, "
            "`table.to_dict('records')`."
        )
    if isinstance(rows, torch.utils.data.IterableDataset) or not hasattr(rows, "__getitem__"):
        if not hasattr(rows, "__iter__") or hasattr(rows, "__next__"):
            raise ValueError(
                f"A data set must be a list, a `datasets` or torch data set of rows, got {type(rows).__name__}, "
                f"which cannot be read more than once."
            )
        return EncodedStream(rows, encoder)
    if not hasattr(rows, "__len__") or isinstance(rows, (str, bytes)):
        raise ValueError(f"A data set must be a list, a `datasets` or torch data set of rows, got {rows!r:.80}.")
    return EncodedDataset(rows, encoder, cache)


def _plain(rows):
    """
    A `datasets` set with its values as Python's, not tensors, and its pictures as files' bytes: they are decoded as
    all others are, once they are needed.
    """
    if not hasattr(rows, "cast_column") or not rows.features:
        return rows
    from datasets import Dataset, Image, List

    if isinstance(rows, Dataset) and rows.format["type"] != "custom":  # which is a transform of the user's
        rows = rows.with_format(None)
    for name, feature in rows.features.items():
        if isinstance(feature, Image):
            rows = rows.cast_column(name, Image(decode=False))
        elif isinstance(getattr(feature, "feature", None), Image):
            rows = rows.cast_column(name, List(Image(decode=False)))
    return rows
