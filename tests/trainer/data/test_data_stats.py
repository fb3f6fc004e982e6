"""Statistics: hand-counted rows, duplicates, leaks between splits, and a plot that is drawn."""

import json

import numpy as np
import pytest
from PIL import Image

from safevlm.trainer.data import SafetyRow
from safevlm.trainer.data.fingerprints import ImageIndex
from safevlm.trainer.data.stats import data_stats
from safevlm.trainer.data.stats_plot import draw_stats


def picture(seed):
    noise = np.random.default_rng(seed).integers(0, 255, (24, 24, 3), np.uint8)
    return Image.fromarray(noise).resize((96, 64), Image.Resampling.BICUBIC)


A, B = picture(1), picture(2)


def row(name, *images, question="Why?", answer="So.", category=6, level=0, source="s", split="", dependent=None):
    content = [{"type": "image"}] * len(images) + [{"type": "text", "text": question}]
    messages = [{"role": "user", "content": content}]
    if answer:
        messages.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})
    return SafetyRow(name, images, messages, category, level, source, split, dependent)


def stats_of(rows, tests=()):
    return data_stats(rows, tests, ImageIndex([*rows, *tests], progress=False))


ROWS = [
    row("0", A, split="train", dependent=True),
    row("1", A, category=1, level=3, split="train", dependent=False, question="How are you?"),
    row("2", A, B, category=1, level=2, source="t", split="test"),
    row("3", category=None, level=None, answer=""),
    row("4", A, split="train"),
]


def test_counts_are_those_counted_by_hand():
    stats = stats_of(ROWS)
    assert stats["rows"] == 5
    assert stats["images"] == {"different": 2, "unusable": 0, "per_row": {"0": 1, "1": 3, "2": 1}}
    assert (stats["categories"]["safe"], stats["categories"]["illegal risk"], stats["categories"]["unknown"]) == (
        2,
        2,
        1,
    )
    assert stats["categories"]["politics"] == 0
    assert stats["levels"] == {"none": 2, "low": 0, "medium": 1, "high": 1, "unknown": 1}
    assert stats["categories_by_level"]["illegal risk"] == {"none": 0, "low": 0, "medium": 1, "high": 1, "unknown": 0}
    assert stats["sources"] == {"s": 4, "t": 1}
    assert stats["splits"] == {"test": 1, "train": 3, "unknown": 1}
    assert stats["question_dependent"] == {"no": 1, "unknown": 3, "yes": 1}
    assert stats["turns"] == {"1": 1, "2": 4}
    assert stats["characters"]["question"] == {"min": 4, "p5": 4, "p50": 4, "p95": 10.4, "max": 12}
    assert stats["characters"]["answer"]["max"] == 3


def test_duplicates_and_leaks_between_splits_are_listed():
    stats = stats_of(ROWS)
    assert stats["duplicates"]["rows"] == [{"row": "4", "like": "0"}]
    assert (stats["duplicates"]["exact_rows"], stats["duplicates"]["near_rows"]) == (1, 0)
    assert [(leak["row"], leak["test_row"], leak["kind"]) for leak in stats["leaks"]] == [
        ("0", "2", "exact"),
        ("1", "2", "exact"),
        ("4", "2", "exact"),
    ]


def test_near_copies_count_as_such_and_leak_into_test_rows():
    smaller = A.resize((80, 54))
    stats = stats_of([row("0", A), row("1", smaller)], [row("t", smaller, question="Else?")])
    assert (stats["duplicates"]["exact_rows"], stats["duplicates"]["near_rows"]) == (0, 1)
    assert stats["duplicates"]["near_images"] == [["<image in memory, 96x64>", "<image in memory, 80x54>"]]
    assert [(leak["row"], leak["kind"], leak["test_split"]) for leak in stats["leaks"]] == [
        ("0", "near", "unknown"),
        ("1", "exact", "unknown"),
    ]


def test_rows_with_unusable_images_are_counted_and_compared_with_nothing(image_folder):
    stats = stats_of([row("0", image_folder / "broken.png"), row("1", image_folder / "gone.png"), row("2", A)])
    assert stats["images"]["unusable"] == 2 and stats["images"]["different"] == 1
    assert stats["rows"] == 3 and stats["duplicates"]["rows"] == []


@pytest.mark.parametrize("rows", [ROWS, ROWS[3:4], [row(f"{n}", source=f"source {n}") for n in range(30)]])
def test_statistics_are_json_and_can_be_drawn(rows, tmp_path):
    stats = stats_of(rows)
    assert json.loads(json.dumps(stats)) == stats
    draw_stats(stats, tmp_path / "stats.png")
    drawn = np.asarray(Image.open(tmp_path / "stats.png").convert("L"))
    assert drawn.shape[1] == 1800 and drawn.std() > 10
