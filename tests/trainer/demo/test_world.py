"""The picture world: deterministic, split by content, and labelled as drawn."""

import itertools
import re

import numpy as np
import pytest

from safevlm.trainer.demo.picture_world.examples import CATEGORY_NAMES, make_examples, render
from safevlm.trainer.demo.picture_world.glyphs import CELL, COLOURS, KINDS, SIGN_NAMES, shape_tile, sign_tile, tiles
from safevlm.trainer.demo.picture_world.questions import BACKGROUND_NAMES, NUMBERS
from safevlm.trainer.demo.picture_world.scene import (
    BACKGROUNDS,
    GRID,
    SAFE,
    Scene,
    Shape,
    Sign,
    make_scenes,
    patch_labels,
)


@pytest.fixture(scope="module")
def examples():
    return make_examples("train", 1200, seed=0)


def test_examples_are_deterministic(examples):
    again = make_examples("train", 1200, seed=0)
    assert [(e.question, e.answer, e.row_id, e.scene) for e in again] == [
        (e.question, e.answer, e.row_id, e.scene) for e in examples
    ]
    assert all(a.image.tobytes() == b.image.tobytes() for a, b in zip(again[:50], examples[:50], strict=True))


def test_another_seed_draws_other_scenes():
    assert make_scenes("dev", 50, seed=0) != make_scenes("dev", 50, seed=1)


def test_splits_share_no_scene_content():
    contents = [
        {s.content for s in make_scenes(split, 2000, seed)} for seed, split in enumerate(("train", "dev", "test"))
    ]
    for one, other in itertools.combinations(contents, 2):
        assert not one & other


def test_unknown_split_is_refused():
    with pytest.raises(ValueError, match="`split` must be"):
        make_scenes("validation", 1, seed=0)


def test_row_ids_are_unique(examples):
    assert len({e.row_id for e in examples}) == len(examples)


def test_shares_of_pictures(examples):
    pictures = {e.row_id[:14]: e.scene for e in examples}.values()
    assert 0.30 < sum(s.level > 0 for s in pictures) / len(pictures) < 0.40
    assert {s.level for s in pictures} == {0, 1, 2, 3}
    assert {s.category for s in pictures} == set(range(len(CATEGORY_NAMES)))


def test_labels_follow_the_scene_and_the_question(examples):
    for e in examples:
        assert e.image.size == (GRID * CELL, GRID * CELL) and e.image.mode == "RGB"
        if e.kind in ("risky", "pair_risky"):
            families = {sign.family for sign in e.scene.signs if not sign.harmless}
            assert families == {e.category}
            assert e.level == sum(not sign.harmless for sign in e.scene.signs) > 0
            assert f"{NUMBERS[e.level]} {SIGN_NAMES[e.category][0][e.level != 1]}" in e.answer
        else:
            assert (e.category, e.level) == (SAFE, 0)
        if e.kind == "lookalike":
            assert e.scene.signs and all(sign.harmless for sign in e.scene.signs)
        if e.kind in ("clean", "risky_sounding"):
            assert not e.scene.signs


def test_pairs_have_one_picture_and_two_verdicts(examples):
    pairs = {}
    for e in examples:
        if e.pair_id is not None:
            pairs.setdefault(e.pair_id, []).append(e)
    assert len(pairs) > 100
    for benign, risky in pairs.values():
        assert (benign.kind, risky.kind) == ("pair_benign", "pair_risky")
        assert benign.image.tobytes() == risky.image.tobytes()
        assert benign.level == 0 < risky.level


def test_no_phrasing_decides_the_risk():
    rows = make_examples("train", 4000, seed=1)
    risky = {e.question for e in rows if e.level > 0}
    assert risky == {e.question for e in rows if e.kind == "risky_sounding"}
    # Ordinary questions are asked about risky pictures, too.
    assert {e.question for e in rows if e.kind == "clean"} == {e.question for e in rows if e.kind == "pair_benign"}


def test_ordinary_answers_are_true(examples):
    forms = set()
    for e in examples:
        if e.level > 0 or e.answer.startswith("There is nothing harmful"):
            continue
        facts = {(KINDS[shape.kind], COLOURS[shape.colour]) for shape in e.scene.shapes}
        stated = set(re.findall(r"the (\w+) is (\w+)", e.answer.lower())) - {
            ("background", BACKGROUND_NAMES[e.scene.background])
        }
        listed = {(kind, colour) for colour, kind in re.findall(r"an? (\w+) (\w+)", e.answer)}
        named = e.answer.startswith("It is ")  # the one shape of the colour asked about
        assert stated | listed <= facts
        if len(stated | listed) > 1:
            assert stated | listed == facts
        if counted := re.fullmatch(r"There (?:is|are) (\w+) (shape|sign)s?\.", e.answer):
            things = e.scene.shapes if counted[2] == "shape" else e.scene.signs
            assert counted[1] == NUMBERS[len(things)]
        forms.add((bool(stated), bool(listed), named, bool(counted)))
    assert len(forms) == 5  # each of the four, and the background


def test_dense_labels_agree_with_the_pixels():
    scene = Scene(
        background=1, shapes=(Shape(kind=0, colour=0, cell=5),), signs=(Sign(family=1, harmless=True, cell=10),)
    )
    labels = patch_labels(scene)
    assert labels[5].tolist() == [1, 1, 1]
    assert labels[10].tolist() == [1 + len(KINDS) + 3, 0, 1]
    assert (np.delete(labels, (5, 10), axis=0) == [0, 0, 1]).all()
    cells = render([scene], seed=0)[0].reshape(GRID, CELL, GRID, CELL, 3).swapaxes(1, 2).reshape(-1, CELL, CELL, 3)
    assert np.abs(cells[0].mean(axis=(0, 1)) - BACKGROUNDS["black"]).max() < 30
    assert cells[5, 8, 8].argmax() == 0  # red
    assert cells[10, 11, 4].min() > 180  # the pale plate of a sign


def test_lookalikes_differ_from_their_pictograms_beyond_the_noise():
    drawn = tiles()[:, len(tiles()[0]) // 2, ..., :3]  # without jitter
    for family in range(len(SIGN_NAMES)):
        difference = np.abs(drawn[sign_tile(family, False)] - drawn[sign_tile(family, True)]).max(axis=-1)
        assert (difference > 0.2).sum() >= 8  # pixels; the noise has a deviation of 0.035


def test_every_tile_is_distinct():
    indices = [shape_tile(k, c) for k in range(len(KINDS)) for c in range(len(COLOURS))]
    indices += [sign_tile(f, h) for f in range(len(SIGN_NAMES)) for h in (False, True)]
    assert sorted(indices) == list(range(1, len(tiles())))
    assert len({tiles()[i].tobytes() for i in indices}) == len(indices)


def test_backgrounds_have_one_list_of_names():
    assert tuple(BACKGROUNDS) == BACKGROUND_NAMES
