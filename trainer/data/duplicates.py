"""Rows that say the same, rows that contradict each other, and rows that leak from a training into a test set.

One picture with two questions is two rows: a duplicate shares pictures, question and labels with an earlier row. The
question is the text of the user turns, white space aside. All functions are linear in the number of rows and need the
images of all rows to be sound (`ImageIndex.error`).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Hashable, Sequence
from typing import NamedTuple

from .fingerprints import ImageIndex
from .images import ImageSource
from .safety_row import SafetyRow


class Leak(NamedTuple):
    """A row whose image is in a test row, too; for rows without images, whose question is.

    Args:
        row, test_row (`int`): Indices of the two rows.
        image, test_image (*optional*): The images found equal; `None` for rows without images.
        kind (`str`): `"exact"` (same pixels), `"near"` (near duplicates) or `"text"`.
        distance (`int`, *optional*): Bits in which the perceptual hashes differ; `None` for texts and exact copies.
            More than the index' limit where the two are near a third image instead of each other.
    """

    row: int
    test_row: int
    image: ImageSource | None
    test_image: ImageSource | None
    kind: str
    distance: int | None


def question_of(row: SafetyRow) -> tuple[str, ...]:
    """The texts of the user turns, white space aside."""
    turns = (turn for turn in row.messages if turn["role"] == "user")
    return tuple(
        " ".join(" ".join(part["text"] for part in turn["content"] if part["type"] == "text").split())
        for turn in turns
    )


def contradict(row: SafetyRow, other: SafetyRow) -> bool:
    """Whether both have a category, or both a level, and not the same. An unknown label contradicts none."""
    pairs = ((row.category, other.category), (row.level, other.level))
    return any(one is not None and two is not None and one != two for one, two in pairs)


def find_conflicts(rows: Sequence[SafetyRow], index: ImageIndex) -> list[list[int]]:
    """Groups of row indices with the same pixels and the same question, each contradicting another of its group."""
    alike = _grouped(range(len(rows)), lambda number: (_images(rows[number], index.exact), question_of(rows[number])))
    conflicts = []
    for group in alike:
        # Every label once: a group of many rows has few different labels.
        kinds = {(rows[number].category, rows[number].level): rows[number] for number in group}
        if len(kinds) > 1:
            members = [n for n in group if any(contradict(rows[n], other) for other in kinds.values())]
            conflicts += [members] if members else []
    return conflicts


def find_duplicates(rows: Sequence[SafetyRow], same_image: Callable[[ImageSource], str]) -> list[tuple[int, int]]:
    """Pairs (duplicate, first row like it): the same images by `same_image`, the same question, the same labels.

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
    """The rows that share an image, exactly or nearly, with a test row, each with the first one found."""
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
        same = [("exact", image, exact.get(index.exact(image))) for image in row.images]
        same += [("near", image, near.get(index.group(image))) for image in row.images]
        for kind, image, match in same:
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
