"""Batches of encoded rows: tokens are padded on the right, image tensors concatenated in the order of the rows."""

import torch
from torch.nn.utils.rnn import pad_sequence

from safevlm.safety_labels import IGNORE_INDEX

ROW_LABELS = ("safety_level_labels", "safety_category_labels")


class SafeVlmDataCollator:
    """
    Collates encoded rows, as [`encode_row`] returns them.

    Args:
        pad_token_id (`int`): The tokenizer's.
    """

    def __init__(self, pad_token_id: int):
        self.pad_token_id = pad_token_id

    def __call__(self, rows: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        lengths = torch.tensor([len(row["input_ids"]) for row in rows])
        batch = {"attention_mask": (torch.arange(int(lengths.max())) < lengths.unsqueeze(1)).long()}
        padding = {"input_ids": self.pad_token_id, "labels": IGNORE_INDEX}
        for name in dict.fromkeys(name for row in rows for name in row):
            values = [row[name] for row in rows if name in row]
            if name in ROW_LABELS:
                batch[name] = torch.stack(values)
            elif all(len(row[name]) == len(row["input_ids"]) for row in rows if name in row) and values[0].ndim == 1:
                values = [row.get(name, torch.zeros_like(row["input_ids"])) for row in rows]
                batch[name] = pad_sequence(values, batch_first=True, padding_value=padding.get(name, 0))
            else:
                batch[name] = concatenate_images(values)
        return batch


def concatenate_images(values: list[torch.Tensor]) -> torch.Tensor:
    """
    Concatenates along the first dimension, the images. The second, an image's tiles, is padded with zeros, as the
    families' processors do.
    """
    if values[0].ndim > 2:
        tiles = max(value.shape[1] for value in values)
        values = [
            torch.cat([value, value.new_zeros(len(value), tiles - value.shape[1], *value.shape[2:])], dim=1)
            if value.shape[1] < tiles
            else value
            for value in values
        ]
    return torch.cat(values)
