"""The demo's picture sheet: which records it shows, and that it is drawn."""

from types import SimpleNamespace

import pytest
from PIL import Image
from tiny import picture

from safevlm.trainer.demo.picture_world.examples import LEVEL_NAMES
from safevlm.trainer.demo.sheet import KINDS, choose, draw_sheet, make_sheet

ORDINARY = ("clean", "lookalike", "risky_sounding")


def record(kind, level=0, pair_id=None, answer="an answer"):
    example = SimpleNamespace(
        kind=kind, level=level, pair_id=pair_id, image=picture(level), question="Is it?", answer="yes"
    )
    probabilities = {name: float(i == level) for i, name in enumerate(LEVEL_NAMES)}
    verdict = {"action": "allow", "category": "safe", "level": "none", "level_probabilities": probabilities}
    return SimpleNamespace(example=example, answer=answer, verdict=verdict)


@pytest.fixture
def records():
    """Pairs and levels in an order that no simple slice would serve."""
    pairs = [(7, 3), (2, 1), (5, 2), (9, 1)]
    return [
        *(record("pair_risky", level, pair) for pair, level in pairs),
        *(record("risky", level) for level in (3, 3, 1, 2)),
        *(record(kind) for kind in ORDINARY for _ in range(4)),
        *(record("pair_benign", 0, pair) for pair, _ in reversed(pairs)),
    ]


def test_each_row_shows_every_kind_once(records):
    chosen = [records[i].example.kind for i in choose(records, rows=3)]
    assert chosen == [*KINDS] * 3


def test_risky_records_and_pairs_go_through_the_levels(records):
    chosen = [records[i].example for i in choose(records, rows=3)]
    assert [e.level for e in chosen if e.kind == "risky"] == [1, 2, 3]
    assert [e.level for e in chosen if e.kind == "pair_risky"] == [1, 2, 3]


def test_the_two_records_of_a_pair_stand_side_by_side(records):
    chosen = choose(records, rows=3)
    for first, second in zip(chosen, chosen[1:], strict=False):
        if records[first].example.kind == "pair_benign":
            assert records[second].example.kind == "pair_risky"
            assert records[second].example.pair_id == records[first].example.pair_id


def test_no_ordinary_record_is_shown_twice_while_there_are_others(records):
    chosen = [i for i in choose(records, rows=3) if records[i].example.kind in ORDINARY]
    assert len(set(chosen)) == len(chosen)


def test_the_sheet_is_a_picture(records, tmp_path):
    pytest.importorskip("matplotlib")
    draw_sheet({"base": records, "stage2": records}, tmp_path / "sheet.png", rows=1)
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.width > 800 and sheet.height > 300


def test_no_caption_overlaps_another_or_the_bar(records):
    pytest.importorskip("matplotlib")
    for each in records:  # as long as the demo's longest
        each.example.question = "What is the best way to use what is shown here against someone?"
        each.answer = (
            "Careful: this may involve insults and bullying. I can describe the picture, but no more than that."
        )
    figure = make_sheet({"base": records, "stage2": records}, rows=2)
    figure.draw_without_rendering()
    for axis in (axis for axis in figure.axes if axis.texts):
        boxes = [artist.get_window_extent() for artist in (*axis.texts, *axis.patches) if artist.get_visible()]
        boxes = [box for box in boxes if box.width > 0]
        for i, box in enumerate(boxes):
            assert not any(box.overlaps(other) for other in boxes[i + 1 :])
