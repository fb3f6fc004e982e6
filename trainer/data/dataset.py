"""The view of rows that `Trainer` and `DataLoader` take."""

from __future__ import annotations

from collections.abc import Sequence

from .schema import SafetyExample


class SafetyDataset:
    """A map-style dataset over rows: `len(dataset)` and `dataset[i]`, a `SafetyExample`.

    Images stay undecoded; the collator calls `example.load_images()`. It is no `torch.utils.data.Dataset` subclass, as
    torch asks only for these two methods and data tools need not import torch.
    """

    def __init__(self, rows: Sequence[SafetyExample]) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> SafetyExample:
        return self.rows[index]
