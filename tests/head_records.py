"""Invented outputs of a safety head, for tests of measures and calibration."""

from dataclasses import replace

import numpy as np

from safevlm.safety_labels import PAPER_LABELS as LABELS
from safevlm.trainer.evaluation import HeadPrediction

SAFE = LABELS.safe_category_id


def with_logits(record, level=lambda logits: logits, category=lambda logits: logits):
    """`record` with functions applied to the logits of each reading."""
    return replace(
        record,
        level_logits=tuple(tuple(level(logits)) for logits in record.level_logits),
        category_logits=tuple(tuple(category(logits)) for logits in record.category_logits),
    )


def record(level=0, category=SAFE, level_logits=(0.0,) * 4, category_logits=(0.0,) * 7, images=("a",), **changes):
    fields = {
        "row_id": "row",
        "source": "made up",
        "level": level,
        "category": category,
        "level_logits": (tuple(level_logits),) * bool(images),
        "category_logits": (tuple(category_logits),) * bool(images),
        "whole_conversation": (False,) * bool(images),
        "images": tuple(images),
        "fingerprint": "0",
    }
    return HeadPrediction(**{**fields, **changes})


def scored(score, level=0, category=SAFE, verdict=0, **changes):
    """A record with a given risk score at temperature 1; `verdict` is its most probable risky category."""
    share = np.log([1 - score, score / 3, score / 3, score / 3])
    one_hot = [3.0 if c == verdict else 0.0 for c in range(7)]
    return record(level, category, share.tolist(), one_hot, **changes)


def random_records(n, seed=0, sharpness=2.0, rows_per_image=1):
    """Records of all levels and categories, about half of them clean. The head is right often but not always."""
    rng = np.random.default_rng(seed)
    records = []
    for i in range(n):
        level = int(rng.integers(1, 4)) if rng.random() < 0.5 else 0
        category = int(rng.integers(6)) if level else SAFE
        level_logits, category_logits = rng.normal(size=4), rng.normal(size=7)
        level_logits[level] += sharpness
        category_logits[category] += sharpness
        images = (f"image-{i // rows_per_image}",)
        source = "even" if i % 2 == 0 else "odd"
        logits = level_logits.tolist(), category_logits.tolist()
        records.append(record(level, category, *logits, images, row_id=f"row-{i}", source=source))
    return records
