"""Batches of encoded rows: tokens padded on the right, image tensors concatenated in the order of the rows."""

import torch

from safevlm.losses import IGNORE_INDEX

PADDING = {"labels": IGNORE_INDEX, "safety_question_mask": 0}
ROW_LABELS = ("safety_level_labels", "safety_category_labels")


class SafeVlmDataCollator:
    """
    Collates what [`EncodedDataset`] returns.

    Args:
        pad_token_id (`int`)
    """

    def __init__(self, pad_token_id: int):
        self.pad_token_id = pad_token_id

    def __call__(self, rows: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        length = max(len(row["input_ids"]) for row in rows)
        lengths = torch.tensor([len(row["input_ids"]) for row in rows])
        batch = {"attention_mask": (torch.arange(length) < lengths.unsqueeze(1)).long()}
        for name in dict.fromkeys(name for row in rows for name in row):
            values = [row[name] for row in rows if name in row]
            if name in ROW_LABELS:
                batch[name] = torch.stack(values)
            elif values[0].ndim == 1 and name in ("input_ids", *PADDING):
                padding = PADDING.get(name, self.pad_token_id)
                batch[name] = torch.nn.utils.rnn.pad_sequence(values, batch_first=True, padding_value=padding)
            else:
                batch[name] = torch.cat(values)
        return batch
