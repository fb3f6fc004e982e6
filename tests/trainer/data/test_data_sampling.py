"""Sampling: balanced mixes and held-out parts that share no image with the rest."""

import os
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from safevlm.trainer.data import DataError, SafetyRow, balance, split_holdout


def make_row(number, category=6, images=()):
    content = [{"type": "image"}] * len(images) + [{"type": "text", "text": "Hi"}]
    return SafetyRow(str(number), images, [{"role": "user", "content": content}], category)


def counts(rows):
    return Counter(row.category for row in rows)


CATEGORIES = [0] * 5 + [1] * 9 + [2] * 7 + [6] * 40
MIXED = [make_row(number, category) for number, category in enumerate(CATEGORIES)]


def test_balance_defaults_to_the_smallest_risk_category_and_as_many_clean_rows():
    assert counts(balance(MIXED)) == {0: 5, 1: 5, 2: 5, 6: 5}


def test_balance_takes_the_counts_asked_for_without_repeats_in_file_order():
    chosen = balance(MIXED, per_category=3, clean=20)
    assert counts(chosen) == {0: 3, 1: 3, 2: 3, 6: 20}
    numbers = [int(row.row_id) for row in chosen]
    assert numbers == sorted(set(numbers))


def test_balance_depends_on_the_seed_alone():
    assert balance(MIXED, seed=1) == balance(MIXED, seed=1) != balance(MIXED, seed=2)


@pytest.mark.parametrize(
    ("rows", "options", "reason"),
    [
        (MIXED, {"per_category": 6}, "asked for 6 rows of category 'politics', which has 5; lower `per_category`"),
        (MIXED, {"clean": 41}, "asked for 41 rows of category 'safe', which has 40; lower `clean`"),
        (MIXED, {"clean": -1}, "asked for -1"),
        (MIXED[-3:], {}, "no risky row among 3"),
        ([make_row(0, None)], {}, "assume_safe=True"),
        ([make_row(0, 9)], {}, "needs 0 to 6"),
    ],
)
def test_balance_never_gives_less_than_asked(rows, options, reason):
    with pytest.raises(DataError, match=reason):
        balance(rows, **options)


def test_holdout_is_stratified():
    rest, held_out = split_holdout(MIXED * 10, 0.2)
    assert counts(held_out) == {0: 10, 1: 18, 2: 14, 6: 80}
    assert len(rest) + len(held_out) == len(MIXED) * 10


def test_holdout_depends_on_the_seed_alone():
    assert split_holdout(MIXED, 0.3, seed=1) == split_holdout(MIXED, 0.3, seed=1)
    assert split_holdout(MIXED, 0.3, seed=1) != split_holdout(MIXED, 0.3, seed=2)


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.tuples(st.sampled_from([None, 0, 1, 6]), st.sets(st.integers(0, 15), max_size=3)), max_size=40),
    st.floats(0.05, 0.95),
    st.integers(0, 5),
)
def test_rows_sharing_an_image_stay_on_one_side(plan, fraction, seed):
    rows = [
        make_row(n, category, tuple(f"{i}.png" for i in sorted(images))) for n, (category, images) in enumerate(plan)
    ]
    try:
        rest, held_out = split_holdout(rows, fraction, seed)
    except DataError as error:
        assert "cannot hold out" in str(error)
        return
    assert sorted(int(row.row_id) for row in rest + held_out) == list(range(len(rows)))
    sides = [{image for row in side for image in row.images} for side in (rest, held_out)]
    assert not sides[0] & sides[1]


@settings(max_examples=50, deadline=None)
@given(st.lists(st.sampled_from([None, 0, 1, 2, 6]), min_size=20, max_size=60), st.floats(0.1, 0.9))
def test_holdout_of_unshared_rows_has_the_size_asked_for(categories, fraction):
    rows = [make_row(number, category) for number, category in enumerate(categories)]
    _, held_out = split_holdout(rows, fraction)
    assert abs(len(held_out) - fraction * len(rows)) <= 1


def test_holdout_counts_rows_not_groups():
    rows = [make_row(number, 6, (f"{number // 5}.png",)) for number in range(100)]
    assert len(split_holdout(rows, 0.2)[1]) == 20


def test_the_same_picture_is_found_under_other_spellings_and_in_memory(tmp_path):
    Image.new("RGB", (2, 2)).save(tmp_path / "a.png")
    (tmp_path / "link.png").symlink_to("a.png")
    paths = [(str(tmp_path / "a.png"),), (tmp_path / "link.png",), (os.path.relpath(tmp_path / "a.png"),)]
    red, again, blue = (Image.new("RGB", (2, 2), colour) for colour in ("red", "red", "blue"))
    for same in (paths, [(red,), (again,)], [(b"1",), (b"1",)]):
        with pytest.raises(DataError, match=r"1 group\(s\)"):
            split_holdout([make_row(number, 6, images) for number, images in enumerate(same)], 0.5)
    assert len(split_holdout([make_row(0, 6, (red,)), make_row(1, 6, (blue,))], 0.5)[1]) == 1


@pytest.mark.parametrize("fraction", [0, 1, -0.1, 1.5, float("nan")])
def test_fraction_must_leave_two_parts(fraction):
    with pytest.raises(ValueError, match="`fraction` must be between 0 and 1"):
        split_holdout(MIXED, fraction)
