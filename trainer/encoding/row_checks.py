"""Checks of all rows before the first one trains: bad rows, rows without labels, rows that are too long."""

import logging
from dataclasses import dataclass
from functools import lru_cache

from PIL import Image
from tqdm.auto import tqdm

from safevlm.model_policy import saved_token_ids
from safevlm.trainer.data import SafetyRow, probe_image

from .encoded_datasets import EncodedDataset
from .row_encoder import RowEncoder

logger = logging.getLogger(__name__)
SLACK = 8
"""Error of an estimated length, in tokens per image: text next to an image can merge with its tokens."""


@dataclass
class RowCounts:
    """
    Args:
        rows (`int`): All rows.
        labelled (`int`): Rows with a safety label.
        teaches_head (`int`): Rows with a safety label and a picture, which the safety head learns from.
        useless (`int`): Rows with neither a label nor an answer.
    """

    rows: int = 0
    labelled: int = 0
    teaches_head: int = 0
    useless: int = 0

    def add(self, row: SafetyRow):
        labelled = row.category is not None or row.level is not None
        self.rows += 1
        self.labelled += labelled
        self.teaches_head += labelled and bool(row.images)
        self.useless += not labelled and row.messages[-1]["role"] != "assistant"


def count_rows(rows) -> RowCounts:
    counts = RowCounts()
    for row in rows:
        counts.add(row)
    return counts


def check_counts(counts: RowCounts):
    """Warns about rows without labels. Raises `ValueError` if the safety head could learn from none."""
    if not counts.teaches_head:
        missing = "a safety label" if not counts.labelled else "both a safety label and a picture"
        raise ValueError(
            f"None of the {counts.rows} training rows has {missing}, so the safety head would stay untrained. Rows "
            f"need `category` and `level` (or `safe_type` and `safe_level`); a `taxonomy` maps a data set's own "
            f"labels to them."
        )
    if unlabelled := counts.rows - counts.labelled:
        logger.warning(
            f"{unlabelled} of {counts.rows} training rows have no safety label; they train the language model alone"
            f"{f', and {counts.useless} of them have no answer either and teach nothing' if counts.useless else ''}."
        )


def check_sets(train_dataset, eval_dataset, args):
    """`check_rows` for the data sets of a stage. Rows of a stream are checked when they are reached."""
    evaluated = [] if args.eval_strategy == "no" else eval_dataset
    sets = evaluated.values() if isinstance(evaluated, dict) else [evaluated]
    for rows, needs_labels in ((train_dataset, args.trains_head), *((rows, False) for rows in sets)):
        if isinstance(rows, EncodedDataset):
            check_rows(rows, needs_labels, progress=not args.disable_tqdm)


def check_rows(dataset: EncodedDataset, trains_head: bool, progress: bool = False):
    """
    Checks every row of a data set.

    Args:
        trains_head (`bool`): Whether the safety head learns from the rows.

    Raises:
        `DataError`: A row breaks the schema or is longer than `max_length`.
        `ValueError`: The head is to be trained, but no row has both a label and a picture.
    """
    counts = RowCounts()
    limit = dataset.encoder.max_length
    lengths = None if limit is None else LengthEstimate(dataset.encoder)
    for index in tqdm(range(len(dataset)), desc="Checking lengths", disable=limit is None or not progress):
        row = dataset.row(index)
        counts.add(row)
        if lengths is not None and lengths.may_exceed(row, limit):
            dataset.encoder.encode(row, index)  # raises if it does
    if trains_head:
        check_counts(counts)


class LengthEstimate:
    """
    Estimates how many tokens a row has without decoding its pictures: an image's tokens follow from its size.

    Args:
        encoder (`RowEncoder`)
    """

    def __init__(self, encoder: RowEncoder):
        self.processor = encoder.processor
        self.longest_hint = max(map(len, saved_token_ids(encoder.config).values()), default=0)
        self.image_tokens = lru_cache(maxsize=None)(self._image_tokens)

    def may_exceed(self, row: SafetyRow, limit: int) -> bool:
        """Whether the row may have more than `limit` tokens; `False` is certain."""
        sizes = tuple(probe_image(image, row_id=row.row_id) for image in row.images)
        turned = tuple(size[::-1] for size in sizes)  # EXIF orientation may turn the pictures
        images = max(self.image_tokens(sizes), self.image_tokens(turned)) if sizes else 0
        text = self.processor.apply_chat_template(row.messages, add_generation_prompt=True)
        return self._text_tokens(text) + images + self.longest_hint + SLACK * (1 + len(sizes)) > limit

    def _text_tokens(self, text: str) -> int:
        return len(self.processor.tokenizer(str(text))["input_ids"])

    def _image_tokens(self, sizes: tuple[tuple[int, int], ...]) -> int:
        text = self.processor.image_token * len(sizes)
        inputs = self.processor(images=[Image.new("RGB", size) for size in sizes], text=text, return_tensors="pt")
        return inputs["input_ids"].shape[1]
