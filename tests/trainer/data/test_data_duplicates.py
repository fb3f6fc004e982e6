"""Duplicates: the near-duplicate search equals brute force, real copies are found, distinct pictures are not."""

import io
import itertools

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image, ImageEnhance

from safevlm.trainer.data import ImageError, SafetyRow, load_image
from safevlm.trainer.data.duplicates import contradict, find_conflicts, find_duplicates, find_leaks, question_of
from safevlm.trainer.data.fingerprints import (
    NEAR_DISTANCE,
    ImageIndex,
    fingerprint,
    hash_distance,
    near_groups,
    near_pairs,
)


def picture(seed, size=(96, 64)):
    """A random picture, unlike any other, with detail at all scales that the hash looks at."""
    noise = np.random.default_rng(seed).integers(0, 255, (24, 24, 3), np.uint8)
    return Image.fromarray(noise).resize(size, Image.Resampling.BICUBIC)


def jpeg(image, quality):
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=quality)
    return buffer.getvalue()


def row(name, *images, question="What is this?", category=6, level=0, split=""):
    content = [{"type": "image"}] * len(images) + [{"type": "text", "text": question}]
    return SafetyRow(name, images, [{"role": "user", "content": content}], category, level, split=split)


def index(*rows, **options):
    return ImageIndex(rows, progress=False, **options)


# --- the search


@st.composite
def hash_sets(draw):
    """Hashes of 64 or 128 bits, most of them a few bits from one another."""
    num_bytes = draw(st.sampled_from([8, 16]))
    centres = draw(st.lists(st.binary(min_size=num_bytes, max_size=num_bytes), min_size=1, max_size=4))
    hashes = set()
    for centre, flips in draw(
        st.lists(
            st.tuples(st.sampled_from(centres), st.lists(st.integers(0, 8 * num_bytes - 1), max_size=9)), max_size=30
        )
    ):
        value = int.from_bytes(centre, "big")
        for bit in flips:
            value ^= 1 << bit
        hashes.add(value.to_bytes(num_bytes, "big"))
    return sorted(hashes)


@settings(max_examples=150, deadline=None)
@given(hash_sets(), st.integers(0, 63))
@example([bytes(8), bytes(7) + b"\x01", b"\xff" * 8], 63)
@example([bytes(8)], 0)
@example([], 3)
def test_near_pairs_are_those_of_brute_force(hashes, distance):
    array = (
        np.frombuffer(b"".join(hashes), np.uint8).reshape(len(hashes), -1) if hashes else np.empty((0, 8), np.uint8)
    )
    expected = [
        [i, j]
        for (i, first), (j, second) in itertools.combinations(enumerate(hashes), 2)
        if hash_distance(first, second) <= distance
    ]
    assert near_pairs(array, distance).tolist() == expected


@settings(max_examples=100, deadline=None)
@given(hash_sets(), st.integers(0, 20))
def test_near_groups_are_the_connected_components(hashes, distance):
    groups = near_groups(hashes, distance)
    components = {value: {value} for value in hashes}
    for first, second in itertools.combinations(hashes, 2):
        if hash_distance(first, second) <= distance:
            union = components[first] | components[second]
            components.update(dict.fromkeys(union, union))
    for (first, group), (second, other) in itertools.combinations(zip(hashes, groups, strict=True), 2):
        assert (group == other) == (second in components[first])


@pytest.mark.parametrize("distance", [-1, 64])
def test_distance_must_fit_the_hash(distance):
    with pytest.raises(ValueError, match="`distance` must be in 0..63"):
        near_pairs(np.zeros((2, 8), np.uint8), distance)


def test_a_hundred_thousand_hashes_are_searched_in_seconds():
    """Quadratic Python code would take an hour; here the planted pairs, and no others, are found."""
    draw = np.random.default_rng(0)
    hashes = draw.integers(0, 256, (100_000, 32), np.uint8)
    bits = np.unpackbits(hashes[:500], axis=1)
    bits[np.arange(500)[:, None], draw.permuted(np.tile(np.arange(256), (500, 1)), axis=1)[:, :NEAR_DISTANCE]] ^= 1
    hashes[99_500:] = np.packbits(bits, axis=1)
    assert near_pairs(hashes, NEAR_DISTANCE).tolist() == [[i, 99_500 + i] for i in range(500)]


# --- images


def test_a_lossless_copy_is_exact_and_a_compressed_or_smaller_one_near():
    image = picture(0)
    copy, small = io.BytesIO(), image.resize((48, 32), Image.Resampling.BICUBIC)
    image.save(copy, "BMP")
    brighter = ImageEnhance.Brightness(image).enhance(1.05)
    images = (image, copy.getvalue(), jpeg(image, 40), small, brighter, picture(1))
    known = index(row("0", *images))
    assert known.num_images == 6
    assert [known.exact(one) == known.exact(image) for one in images] == [True, True, False, False, False, False]
    assert [known.group(one) == known.group(image) for one in images] == [True, True, True, True, True, False]
    assert known.distance(image, images[2]) <= NEAR_DISTANCE
    assert known.distance(image, images[5]) > NEAR_DISTANCE


def test_pictures_of_one_colour_are_near_nothing_but_themselves():
    red, blue = Image.new("RGB", (9, 9), "red"), Image.new("RGB", (9, 9), "blue")
    known = index(row("0", red, blue, red.copy()))
    assert known.group(red) == known.group(red.copy()) != known.group(blue)
    assert known.distance(red, blue) is None


def test_real_pictures_are_distinct_and_their_compressed_copies_are_found(shared_data):
    paths = sorted((shared_data / "figstep_tiny").rglob("*.png"))[:12]  # the hardest: text in one layout
    paths += sorted((shared_data / "mmbench_samples").rglob("*.jpg"))[:12]
    copies = [jpeg(load_image(path), 50) for path in paths]
    known = index(row("0", *paths, *copies))
    groups = [known.group(path) for path in paths]
    assert len(paths) == 24 and len(set(groups)) == 24
    assert [known.group(copy) for copy in copies] == groups


def test_each_image_is_decoded_once_and_bad_ones_are_kept_apart(image_folder, monkeypatch):
    from safevlm.trainer.data import fingerprints

    loads = []
    monkeypatch.setattr(fingerprints, "load_image", lambda image: loads.append(image) or load_image(image))
    good, broken = image_folder / "a.png", image_folder / "broken.png"
    known = index(row("0", good, good), row("1", good, broken))
    assert sorted(loads) == [good, broken]
    assert known.error(good) is None and "truncated or corrupt" in str(known.error(broken))
    with pytest.raises(ImageError, match="truncated"):
        known.group(broken)


def test_the_fingerprint_names_the_file_and_needs_no_perceptual_hash(image_folder):
    import hashlib

    path = image_folder / "a.png"
    mark = fingerprint(path, perceptual=False)
    assert mark.file_sha256 == hashlib.sha256(path.read_bytes()).hexdigest() and mark.perceptual is None
    assert fingerprint(Image.open(path), perceptual=False) == (None, mark.pixel_sha256, None)


# --- rows


A, B = picture(1), picture(2)
A_AGAIN = jpeg(A, 60)


def test_a_question_is_its_words():
    asked = row("0", A, question="  What\n is this? ")
    assert question_of(asked) == ("What is this?",)


def test_the_same_picture_question_and_labels_make_a_duplicate():
    rows = [row("0", A), row("1", A, question="Why?"), row("2", A_AGAIN), row("3", A), row("4", A, category=1)]
    known = index(*rows)
    assert find_duplicates(rows, known.exact) == [(3, 0)]
    assert find_duplicates(rows, known.group) == [(2, 0), (3, 0)]


def test_order_and_number_of_images_matter():
    rows = [row("0", A, B), row("1", B, A), row("2", A), row("3")]
    assert find_duplicates(rows, index(*rows).group) == []


def test_other_labels_for_the_same_picture_and_question_conflict():
    rows = [row("0", A), row("1", A, category=1, level=3), row("2", A, question="Why?", category=1), row("3", B)]
    assert find_conflicts(rows, index(*rows)) == [[0, 1]]
    near = [row("0", A), row("1", A_AGAIN, category=1, level=3)]
    assert find_conflicts(near, index(*near)) == []  # a small change can make the difference


def test_an_unknown_label_contradicts_none():
    assert not contradict(row("0", category=None, level=3), row("1", category=1, level=3))
    assert contradict(row("0", category=None, level=3), row("1", category=1, level=2))
    rows = [row("0", category=None, level=None), row("1", category=1, level=3), row("2", category=1, level=None)]
    assert find_conflicts(rows, index()) == []
    assert find_conflicts([*rows, row("3", category=1, level=0)], index()) == [[1, 3]]


def test_leaks_are_found_by_pixels_by_sight_and_by_text():
    train = [row("0", A), row("1", B), row("2"), row("3", question="Else?"), row("4", B, A_AGAIN)]
    tests = [row("t0", A, question="Other?"), row("t1")]
    known = index(*train, *tests)
    leaks = find_leaks(train, tests, known)
    assert [(leak.row, leak.test_row, leak.kind) for leak in leaks] == [
        (0, 0, "exact"),
        (2, 1, "text"),
        (4, 0, "near"),
    ]
    assert leaks[2].image == A_AGAIN and leaks[2].test_image == A and leaks[2].distance <= NEAR_DISTANCE


def test_without_tests_there_are_no_leaks():
    assert find_leaks([row("0", A)], [], index(row("0", A))) == []
