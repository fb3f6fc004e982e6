"""Finds every problem of some data files in one pass, without stopping at the first.

A row that cannot be parsed counts as one problem. In the others the images, the answer, the row id and the labels are
checked independently, so a row can have several problems.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from .duplicates import contradict, find_conflicts, question_of
from .errors import DataError
from .fingerprints import ImageIndex
from .readers import Rows
from .safety_row import NOTHING_TO_TRAIN_ON, SafetyRow


@dataclass(frozen=True)
class Problem:
    """
    Args:
        path (`str`): The data file, or all of them.
        row_id (`str`, *optional*): The row; `None` if the whole file is at fault.
        kind (`str`): `"file"` (cannot be read), `"row"` (bad labels, texts or turns), `"image"`, `"text"` (an image
            without a question), `"row_id"` (used by an earlier row), `"answer"` (neither an answer nor a label),
            `"conflict"` (same image and question as another row, other labels), `"labels"` (none in any row).
        reason (`str`): What is wrong and what to do.
    """

    path: str
    row_id: str | None
    kind: str
    reason: str

    def __str__(self) -> str:
        return f"{self.path}: {'' if self.row_id is None else f'row {self.row_id}: '}{self.reason}"


@dataclass
class CheckReport:
    """
    Args:
        problems (`list[Problem]`): In the order of the files.
        rows (`dict[str, int]`): Rows per file, including those with problems.
        num_images (`int`): Number of different images checked.
        without_image (`int`): Readable rows without a picture.
        unlabelled (`int`): Readable rows without category and level.
        unanswered (`int`): Readable rows that end with a question.
        metadata (`dict[str, int]`): Fields that are kept but not used, and how many rows have each.
    """

    problems: list[Problem] = field(default_factory=list)
    rows: dict[str, int] = field(default_factory=dict)
    num_images: int = 0
    without_image: int = 0
    unlabelled: int = 0
    unanswered: int = 0
    metadata: dict[str, int] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def summary(self) -> str:
        bad = len({(problem.path, problem.row_id) for problem in self.problems})
        where = f" in {bad} row{'s' if bad != 1 else ''}" if bad else ""
        lines = []
        if self.metadata:
            fields = ", ".join(f"{name} ({count})" for name, count in self.metadata.items())
            lines.append(f"fields kept as metadata (rows): {fields}")
        if self.without_image:
            lines.append(f"rows without a picture: {self.without_image}")
        if self.unlabelled:
            lines.append(f"rows without a label, which do not train the safety head: {self.unlabelled}")
        if self.unanswered:
            lines.append(f"rows without an answer, which train the safety head alone: {self.unanswered}")
        lines.append(
            f"{sum(self.rows.values())} rows of {len(self.rows)} file{'s' if len(self.rows) != 1 else ''}, "
            f"{self.num_images} images: {len(self.problems) or 'no'} problem{'s' if len(self.problems) != 1 else ''}"
            f"{where}"
        )
        return "\n".join(lines)


def check_files(
    paths: Sequence[str | os.PathLike],
    read: Callable[[str | os.PathLike], Rows],
    *,
    require_answer: bool = True,
    progress: bool = True,
) -> CheckReport:
    """Checks data files together: label conflicts are found across them, row ids are compared within each.

    Args:
        paths (`Sequence[str]`): Data files.
        read (`Callable`): Reads one of them: `read_rows` with its options bound. These must include
            `on_error="skip"` and, to find every problem, `check_images="none"` and `require_answer=False`.
        require_answer (`bool`, *optional*, defaults to `True`): Whether a row with neither an answer nor a label is a
            problem, as in training data.
        progress (`bool`, *optional*, defaults to `True`): Whether to show a progress bar on standard error.
    """
    report = CheckReport()
    read_files: dict[str, Rows] = {}
    for path in dict.fromkeys(map(str, paths)):
        try:
            read_files[path] = read(path)
        except DataError as error:
            report.problems.append(Problem(path, None, "file", _without(f"{path}: ", error)))
            report.rows[path] = 0

    all_rows = [row for rows in read_files.values() for row in rows]
    report.without_image = sum(not row.images for row in all_rows)
    report.unlabelled = sum(not row.is_labelled for row in all_rows)
    report.unanswered = sum(not row.has_answer for row in all_rows)
    report.metadata = dict(sorted(Counter(name for row in all_rows for name in row.metadata).items()))
    index = ImageIndex(all_rows, perceptual=False, progress=progress)
    report.num_images = index.num_images
    conflicts = _conflicts(read_files, index)
    for path, rows in read_files.items():
        report.rows[path] = len(rows) + len(rows.skipped)
        for row_id, reason in rows.skipped:
            report.problems.append(Problem(path, row_id, "row", _without(f"{path}, ", reason)))
        seen = set()
        for number, row in enumerate(rows):
            for kind, reason in [
                *_row_problems(row, index, require_answer),
                *([("row_id", "is the id of an earlier row, too; give each its own")] if row.row_id in seen else []),
                *conflicts.get((path, number), []),
            ]:
                report.problems.append(Problem(path, row.row_id, kind, reason))
            seen.add(row.row_id)
    if all_rows and report.unlabelled == len(all_rows):
        report.problems.append(Problem(", ".join(read_files), None, "labels", _NO_LABELS))
    return report


_NO_LABELS = (
    "no row that can be read has a label, so there is nothing for the safety head to learn; add `category` and "
    "`level`, map the set's own labels by a taxonomy, or read clean rows with --assume-safe"
)


def _row_problems(row: SafetyRow, index: ImageIndex, require_answer: bool) -> list[tuple[str, str]]:
    errors = (index.error(image) for image in dict.fromkeys(row.images))
    problems = [("image", str(error)) for error in errors if error is not None]
    if "" in question_of(row):
        problems.append(("text", "a user turn has an image but no text; write the question"))
    if require_answer and not row.is_trainable:
        problems.append(("answer", NOTHING_TO_TRAIN_ON))
    return problems


def _conflicts(read_files: dict[str, Rows], index: ImageIndex) -> dict[tuple[str, int], list[tuple[str, str]]]:
    """The conflict of each row that has one, by file and index of the row in it."""
    places = [
        (path, number)
        for path, rows in read_files.items()
        for number, row in enumerate(rows)
        if not any(index.error(image) for image in row.images)
    ]
    sound = [read_files[path][number] for path, number in places]
    problems = {}
    for group in find_conflicts(sound, index):
        for member in group:
            other = next(number for number in group if contradict(sound[number], sound[member]))
            own, others = (f"category {row.category}, level {row.level}" for row in (sound[member], sound[other]))
            reason = (
                f"has {own}, but row {sound[other].row_id} of {places[other][0]}, with the same image and question, "
                f"has {others}; correct one"
            )
            problems[places[member]] = [("conflict", reason)]
    return problems


def _without(prefix: str, reason: object) -> str:
    return str(reason).removeprefix(prefix)
