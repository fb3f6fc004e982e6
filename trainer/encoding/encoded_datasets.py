"""Data sets of encoded rows, made of any data set of rows: lists, `datasets`, torch's; of dicts or `SafetyRow`s."""

import torch

from safevlm.trainer.data import SafetyRow

from .row_encoder import EncodedRow, RowEncoder


class EncodedDataset(torch.utils.data.Dataset):
    """
    Encodes rows on access.

    Args:
        rows: Anything with a length that gives rows by index.
        encoder (`RowEncoder`)
        cache (`bool`): Keep encoded rows in memory.
    """

    def __init__(self, rows, encoder: RowEncoder, cache: bool = False):
        self.rows = rows
        self.encoder = encoder
        self._cache = {} if cache else None

    def __len__(self) -> int:
        return len(self.rows)

    def row(self, index: int) -> SafetyRow:
        """The row before encoding, checked."""
        return self.encoder.check(self.rows[index], index)

    def __getitem__(self, index: int) -> EncodedRow:
        if self._cache is not None and index in self._cache:
            return self._cache[index]
        encoded = self.encoder.encode(self.row(index), index)
        if self._cache is not None:
            self._cache[index] = encoded
        return encoded


class EncodedStream(torch.utils.data.IterableDataset):
    """Encodes the rows of an iterable without a length. A row's problems are found only when it is reached."""

    def __init__(self, rows, encoder: RowEncoder):
        self.rows = rows
        self.encoder = encoder

    def __iter__(self):
        for index, row in enumerate(self.rows):
            yield self.encoder.encode(self.encoder.check(row, index), index)

    def set_epoch(self, epoch: int):
        """Passed on to data sets that reshuffle in each epoch."""
        if hasattr(self.rows, "set_epoch"):
            self.rows.set_epoch(epoch)


def encode_rows(rows, encoder: RowEncoder, cache: bool = False):
    """
    Turns any data set into one of encoded rows, and a dict of data sets into a dict of those.

    Raises:
        `ValueError`: `rows` is not a data set, or can be read only once.
    """
    if rows is None or isinstance(rows, (EncodedDataset, EncodedStream)):
        return rows
    if isinstance(rows, dict):
        return {name: encode_rows(part, encoder, cache) for name, part in rows.items()}
    rows = _undecoded(rows)
    if hasattr(rows, "iloc"):
        raise ValueError(
            "A data set must be a list or a `datasets` or torch data set; pass the rows of a table, "
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


def _undecoded(rows):
    """
    A `datasets` set with Python values instead of tensors, and pictures as file bytes, which are then decoded the same
    way as all others. Other data sets are returned as they are.
    """
    if not hasattr(rows, "cast_column") or not rows.features:
        return rows
    from datasets import Dataset, Image, List

    if isinstance(rows, Dataset) and rows.format["type"] != "custom":  # a custom format is the user's transform
        rows = rows.with_format(None)
    for name, feature in rows.features.items():
        if isinstance(feature, Image):
            rows = rows.cast_column(name, Image(decode=False))
        elif isinstance(getattr(feature, "feature", None), Image):
            rows = rows.cast_column(name, List(Image(decode=False)))
    return rows
