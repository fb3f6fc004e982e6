"""Finds rows that repeat each other, rows that contradict each other, and rows that leak into a test set.

A duplicate shares pictures, question and labels with an earlier row; one picture with two questions is two rows. The
question is the text of the user turns, with white space normalised. All functions take linear time, and require that
no image of a row has an `ImageIndex.error`.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Hashable, Sequence
from typing import NamedTuple

from .fingerprints import ImageIndex
from .images import ImageSource
from .safety_row import SafetyRow


class Leak(NamedTuple):
    """A row that shares an image with a test row or, without images, its question.

    Args:
        row, test_row (`int`): Indices of the two rows.
        image, test_image (`ImageSource`, *optional*): The shared images; `None` for rows without images.
        kind (`str`): `"exact"` (same pixels), `"near"` (near duplicates) or `"text"`.
        distance (`int`, *optional*): Bits in which the perceptual hashes differ; `None` for texts and exact copies.
            It exceeds the index's limit if the two are near a third image but not near each other.
    """

    row: int
    test_row: int
    image: ImageSource | None
    test_image: ImageSource | None
    kind: str
    distance: int | None


def question_of(row: SafetyRow) -> tuple[str, ...]:
    """The texts of the user turns, with white space normalised."""
    turns = (turn for turn in row.messages if turn["role"] == "user")
    return tuple(
        " ".join(" ".join(part["text"] for part in turn["content"] if part["type"] == "text").split())
        for turn in turns
    )


def contradict(row: SafetyRow, other: SafetyRow) -> bool:
    """Whether the rows have different categories or different levels. An unknown label contradicts nothing."""
    pairs = ((row.category, other.category), (row.level, other.level))
    return any(None not in pair and pair[0] != pair[1] for pair in pairs)


def find_conflicts(rows: Sequence[SafetyRow], index: ImageIndex) -> list[list[int]]:
    """Groups of row indices: the same pixels and question, and each row contradicts another one of its group."""
    alike = _grouped(range(len(rows)), lambda number: (_images(rows[number], index.exact), question_of(rows[number])))
    conflicts = []
    for group in alike:
        # One row per pair of labels: even large groups have few of them to compare with.
        representatives = {(rows[number].category, rows[number].level): rows[number] for number in group}.values()
        members = [number for number in group if any(contradict(rows[number], other) for other in representatives)]
        if members:
            conflicts.append(members)
    return conflicts


def find_duplicates(rows: Sequence[SafetyRow], same_image: Callable[[ImageSource], str]) -> list[tuple[int, int]]:
    """Pairs (duplicate, first row like it), with the same images (by `same_image`), question and labels.

    Args:
        same_image (`Callable`): `ImageIndex.exact` or `ImageIndex.group`.
    """
    alike = _grouped(
        range(len(rows)),
        lambda number: (
            _images(rows[number], same_image),
            question_of(rows[number]),
            rows[number].category,
            rows[number].level,
        ),
    )
    return sorted((number, group[0]) for group in alike for number in group[1:])


def find_leaks(rows: Sequence[SafetyRow], tests: Sequence[SafetyRow], index: ImageIndex) -> list[Leak]:
    """The rows that share an image, exactly or nearly, with a test row; each with the first such test row."""
    texts, exact, near = {}, {}, {}
    for number, row in enumerate(tests):
        if not row.images:
            texts.setdefault(question_of(row), number)
        for image in row.images:
            exact.setdefault(index.exact(image), (number, image))
            near.setdefault(index.group(image), (number, image))

    leaks = []
    for number, row in enumerate(rows):
        if not row.images and (test := texts.get(question_of(row))) is not None:
            leaks.append(Leak(number, test, None, None, "text", None))
        matches = [("exact", image, exact.get(index.exact(image))) for image in row.images]
        matches += [("near", image, near.get(index.group(image))) for image in row.images]
        for kind, image, match in matches:
            if match is not None:
                test, test_image = match
                distance = index.distance(image, test_image) if kind == "near" else None
                leaks.append(Leak(number, test, image, test_image, kind, distance))
                break
    return leaks


def _images(row: SafetyRow, same_image: Callable[[ImageSource], str]) -> tuple[str, ...]:
    return tuple(same_image(image) for image in row.images)


def _grouped(numbers: Sequence[int], key: Callable[[int], Hashable]) -> list[list[int]]:
    groups = defaultdict(list)
    for number in numbers:
        groups[key(number)].append(number)
    return list(groups.values())
