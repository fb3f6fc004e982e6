"""What is found out about all rows before the first of them trains: bad ones, unlabelled ones, too long ones."""

import logging
from dataclasses import dataclass
from functools import lru_cache

from PIL import Image
from tqdm.auto import tqdm

from safevlm.policy_texts import saved_token_ids
from safevlm.trainer.data import SafetyRow, probe_image

from .encoded_datasets import EncodedDataset
from .row_encoder import RowEncoder

logger = logging.getLogger(__name__)
SLACK = 8
"""Tokens per image by which a count without pixels may be wrong: text can merge with what stands around an image."""


@dataclass
class RowCounts:
    """
    Args:
        rows, labelled, assessed, useless (`int`): All; those with a safety label; of these, those with a picture,
            which are what the safety head learns from; those with neither a label nor an answer.
    """

    rows: int = 0
    labelled: int = 0
    assessed: int = 0
    useless: int = 0

    def add(self, example: SafetyRow):
        labelled = example.category is not None or example.level is not None
        self.rows += 1
        self.labelled += labelled
        self.assessed += labelled and bool(example.images)
        self.useless += not labelled and example.messages[-1]["role"] != "assistant"


def count_rows(examples) -> RowCounts:
    counts = RowCounts()
    for example in examples:
        counts.add(example)
    return counts


def check_counts(counts: RowCounts):
    """Tells of unlabelled rows. Raises `ValueError` if the safety head could learn nothing."""
    if not counts.assessed:
        why = "a safety label" if not counts.labelled else "both a safety label and a picture"
        raise ValueError(
            f"None of the {counts.rows} training rows has {why}, so the safety head would stay untrained. Rows need "
            f"`category` and `level` (or `safe_type` and `safe_level`); a `taxonomy` gives them to data sets with "
            f"labels of their own."
        )
    if unlabelled := counts.rows - counts.labelled:
        logger.warning(
            f"{unlabelled} of {counts.rows} training rows have no safety label; they train the language model alone"
            f"{f', and {counts.useless} of them have no answer either and teach nothing' if counts.useless else ''}."
        )


def check_sets(train_dataset, eval_dataset, args):
    """`check_rows` for all that a stage trains and evaluates on; rows of a stream are checked as they come."""
    evaluated = [] if args.eval_strategy == "no" else eval_dataset
    sets = evaluated.values() if isinstance(evaluated, dict) else [evaluated]
    for rows, needs_labels in ((train_dataset, args.trains_head), *((rows, False) for rows in sets)):
        if isinstance(rows, EncodedDataset):
            check_rows(rows, needs_labels, progress=not args.disable_tqdm)


def check_rows(dataset: EncodedDataset, trains_head: bool, progress: bool = False):
    """
    Raises `DataError` for a row that breaks the schema or is longer than `max_length`, and `ValueError` if the head is
    to be trained and no row can teach it.
    """
    counts = RowCounts()
    limit = dataset.encoder.max_length
    lengths = None if limit is None else LengthEstimate(dataset.encoder)
    rows = range(len(dataset))
    for index in tqdm(rows, desc="Checking lengths", disable=limit is None or not progress):
        example = dataset.example(index)
        counts.add(example)
        if lengths is not None and lengths.may_exceed(example, limit):
            dataset.encoder.encode(example, index)
    if trains_head:
        check_counts(counts)


class LengthEstimate:
    """
    How many tokens a row has, without decoding its pictures: how many an image takes follows from its size.

    Args:
        encoder (`RowEncoder`)
    """

    def __init__(self, encoder: RowEncoder):
        self.processor = encoder.processor
        self.longest_hint = max(map(len, saved_token_ids(encoder.config).values()), default=0)
        self.image_tokens = lru_cache(maxsize=None)(self._image_tokens)

    def may_exceed(self, example: SafetyRow, limit: int) -> bool:
        """Whether the row may have more than `limit` tokens; if not, it has no more."""
        sizes = tuple(probe_image(image, row_id=example.row_id) for image in example.images)
        turned = tuple(size[::-1] for size in sizes)  # as EXIF orientation may have it
        images = max(self.image_tokens(sizes), self.image_tokens(turned)) if sizes else 0
        text = self.processor.apply_chat_template(example.messages, add_generation_prompt=True)
        return self._text_tokens(text) + images + self.longest_hint + SLACK * (1 + len(sizes)) > limit

    def _text_tokens(self, text: str) -> int:
        return len(self.processor.tokenizer(str(text))["input_ids"])

    def _image_tokens(self, sizes: tuple[tuple[int, int], ...]) -> int:
        text = self.processor.image_token * len(sizes)
        inputs = self.processor(images=[Image.new("RGB", size) for size in sizes], text=text, return_tensors="pt")
        return inputs["input_ids"].shape[1]
