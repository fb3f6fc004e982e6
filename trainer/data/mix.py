"""Builds a training set by recipe: draws rows, removes duplicates and leaks, holds a part out, accounts for every row.

The same recipe, seed and inputs give the same bytes, whatever the machine, the hash seed or the order of the file
system: rows keep the order of sources and files, and each step draws with a `random.Random` seeded by its name.
"""

from __future__ import annotations

import json
import os
import random
from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from safevlm.files import file_sha256, replace_folder

from .duplicates import find_conflicts, find_duplicates, find_leaks, question_of
from .errors import DataError
from .fingerprints import ImageIndex
from .labels_file import labels_dict, load_labels
from .mix_output import MANIFEST, MANIFEST_FORMAT, ImagePlacer, check_output, count_labels, input_hashes
from .mix_recipe import MixFile, MixRecipe, MixSource
from .readers import Rows
from .safety_row import SafetyRow
from .sampling import balance, split_holdout
from .writers import IMAGE_MARKER, write_safevlm_jsonl

_LIBRARIES = ("safevlm", "imagehash", "numpy", "pillow", "scipy")


@dataclass(frozen=True)
class Dropped:
    """A row that was left out.

    Args:
        source, row_id (`str`): The row.
        reason (`str`): `"bad_row"`, `"unlabelled"`, `"marker"`, `"image"`, `"leak"`, `"conflict"` or `"duplicate"`.
        detail (`str`): The exact problem.
    """

    source: str
    row_id: str
    reason: str
    detail: str


def mix(
    recipe: MixRecipe, root: str | os.PathLike, output: str | os.PathLike, *, progress: bool = True
) -> dict[str, Any]:
    """Builds the training set of a recipe in a folder, completely or not at all.

    The folder gets `train.jsonl` and, with `holdout`, `heldout.jsonl` (both PSA-VLM/SafeVLM rows); `dropped.jsonl`
    with a line for each row that has a problem; with `images: copy`, `images/`; and `manifest.json` with the recipe,
    the SHA-256 of every input, image and output file, counts, and versions.

    Args:
        recipe (`MixRecipe`): The recipe.
        root (`str` or `os.PathLike`): The folder that the recipe's paths are relative to.
        output (`str` or `os.PathLike`): The folder to write. An earlier result of the same recipe is replaced.
        progress (`bool`, *optional*, defaults to `True`): Whether to show progress bars on standard error.

    Returns:
        `dict`: The manifest.

    Raises:
        `DataError`: A data file cannot be read, or there are too few rows for the recipe.
        `ValueError`: `output` holds something else.
    """
    root, output = Path(os.path.abspath(root)), Path(os.path.abspath(output))
    check_output(output, recipe)
    build = _Build(recipe, root, progress)
    parts = build.run()
    manifest: dict[str, Any] = {}

    def write(partial: Path) -> None:
        manifest.update(build.write(parts, partial))

    output.parent.mkdir(parents=True, exist_ok=True)
    replace_folder(write, output)
    return manifest


class _Build:
    """One run of a recipe: chooses the rows and counts those that it leaves out."""

    def __init__(self, recipe: MixRecipe, root: Path, progress: bool) -> None:
        self.recipe, self.root, self.progress = recipe, root, progress
        self.labels = load_labels(recipe.labels, root)
        self.dropped: list[Dropped] = []
        self.counts: dict[str, Counter[str]] = defaultdict(Counter)  # source -> reason -> rows left out
        self.read_counts: dict[str, int] = {}
        self.inputs: dict[str, str | None] = {}
        self.test_rows_skipped = 0

    def run(self) -> dict[str, list[SafetyRow]]:
        """The chosen rows of each part: `"train"` and, with `holdout`, `"heldout"`."""
        recipe = self.recipe
        rows = [row for source in recipe.sources for row in self._read_source(source)]
        tests = [row for file in recipe.against for row in self._read_tests(file)]
        self.index = ImageIndex([*rows, *tests], distance=recipe.near_distance, progress=self.progress)
        tests = [row for row in tests if not any(map(self.index.error, row.images))]
        rows = self._keep(rows, "unlabelled", _label_missing)
        rows = self._keep(rows, "marker", _marker_in_text)
        rows = self._keep(rows, "image", self._image_error)
        rows = self._without_leaks(rows, tests)
        rows = self._without_conflicts(rows)
        rows = self._without_duplicates(rows)
        rows = self._choose(rows)
        if not recipe.holdout:
            return {"train": rows}
        train, heldout = split_holdout(rows, recipe.holdout, recipe.seed, same_image=self.index.group)
        return {"train": train, "heldout": heldout}

    # --- reading

    def _read(self, file: MixFile, **options) -> Rows:
        self.inputs.update(input_hashes(file.path, self.root))
        return file.read(self.root, labels=self.labels, check_images="none", on_error="skip", **options)

    def _read_source(self, source: MixSource) -> list[SafetyRow]:
        read = self._read(source, assume_safe=source.assume_safe)
        self.read_counts[source.name] = len(read) + len(read.skipped)
        self._drop(Dropped(source.name, row_id, "bad_row", self._portable(why)) for row_id, why in read.skipped)
        seen: Counter[str] = Counter()
        rows = []
        for row in read:
            seen[row.row_id] += 1
            number = f"#{seen[row.row_id]}" if seen[row.row_id] > 1 else ""
            rows.append(replace(row, row_id=f"{source.name}/{row.row_id}{number}", source=source.name))
        return self._cap(rows, "max_rows", lambda row: row.source, {source.name: source.max_rows})

    def _read_tests(self, file: MixFile) -> Rows:
        rows = self._read(file, require_answer=False)
        self.test_rows_skipped += len(rows.skipped)
        return rows

    # --- leaving out

    def _drop(self, dropped: Iterable[Dropped]) -> None:
        for entry in dropped:
            self.dropped.append(entry)
            self.counts[entry.source][entry.reason] += 1

    def _keep(
        self, rows: Sequence[SafetyRow], reason: str, problem: Callable[[SafetyRow], str | None]
    ) -> list[SafetyRow]:
        """The rows without a problem."""
        kept = []
        for row in rows:
            if (detail := problem(row)) is None:
                kept.append(row)
            else:
                self._drop([Dropped(row.source, row.row_id, reason, detail)])
        return kept

    def _without(self, rows: Sequence[SafetyRow], reason: str, details: Mapping[int, str]) -> list[SafetyRow]:
        """The rows without those of `details`, which maps the index of a row to what is wrong with it."""
        self._drop(
            Dropped(rows[number].source, rows[number].row_id, reason, details[number]) for number in sorted(details)
        )
        return [row for number, row in enumerate(rows) if number not in details]

    def _image_error(self, row: SafetyRow) -> str | None:
        errors = [error for image in row.images if (error := self.index.error(image)) is not None]
        return self._portable(str(errors[0])) if errors else None

    def _without_leaks(self, rows: Sequence[SafetyRow], tests: Sequence[SafetyRow]) -> list[SafetyRow]:
        relations = {
            "exact": "shares an image with",
            "near": "has a near duplicate of an image of",
            "text": "asks the same as",
        }
        leaks = find_leaks(rows, tests, self.index)
        details = {leak.row: f"{relations[leak.kind]} test row {tests[leak.test_row].row_id}" for leak in leaks}
        return self._without(rows, "leak", details)

    def _without_conflicts(self, rows: Sequence[SafetyRow]) -> list[SafetyRow]:
        details = {}
        for group in find_conflicts(rows, self.index):
            names = ", ".join(rows[number].row_id for number in group)
            details.update(dict.fromkeys(group, f"same image and question, different labels: {names}"))
        return self._without(rows, "conflict", details)

    def _without_duplicates(self, rows: Sequence[SafetyRow]) -> list[SafetyRow]:
        if self.recipe.duplicates == "keep":
            return list(rows)
        same_image = self.index.group if self.recipe.duplicates == "near" else self.index.exact
        duplicates = find_duplicates(rows, same_image)
        details = {number: f"says the same as row {rows[first].row_id}" for number, first in duplicates}
        return self._without(rows, "duplicate", details)

    # --- drawing

    def _choose(self, rows: list[SafetyRow]) -> list[SafetyRow]:
        recipe, safe = self.recipe, self.labels.safe_category_id

        def category(row: SafetyRow) -> int:
            return row.category

        risky = set(range(len(self.labels.category_names))) - {safe}
        rows = self._cap(rows, "max_per_category", category, dict.fromkeys(risky, recipe.max_per_category))
        sizes = Counter(map(category, rows))
        num_clean = sizes.pop(safe, 0)
        num_risky = len(sizes) * min(sizes.values(), default=0) if recipe.balance else sum(sizes.values())
        wanted = num_clean if recipe.clean_ratio is None else round(recipe.clean_ratio * num_risky)
        if wanted > num_clean:
            raise DataError(
                f"`clean_ratio` {recipe.clean_ratio} asks for {wanted} clean rows beside {num_risky} risky ones, but "
                f"there are {num_clean}; lower it, or add clean rows."
            )
        rows = self._cap(rows, "clean_ratio", category, {safe: wanted})
        if recipe.balance:
            chosen = balance(rows, clean=wanted, seed=recipe.seed, labels=self.labels)
            self._count_missing(rows, chosen, "balance")
            rows = chosen
        if not rows:
            raise DataError(f"no row is left of {sum(self.read_counts.values())}: {_totals(self.counts)}.")
        return rows

    def _cap(
        self,
        rows: list[SafetyRow],
        reason: str,
        key: Callable[[SafetyRow], Hashable],
        limits: Mapping[Hashable, int | None],
    ) -> list[SafetyRow]:
        """At most `limits[key]` rows of each key, drawn by seed, in their former order."""
        members = defaultdict(list)
        for number, row in enumerate(rows):
            members[key(row)].append(number)
        chosen: set[int] = set()
        for value, numbers in members.items():
            limit = limits.get(value)
            if limit is not None and limit < len(numbers):
                numbers = random.Random(f"{self.recipe.seed} {reason} {value}").sample(numbers, limit)
            chosen.update(numbers)
        kept = [row for number, row in enumerate(rows) if number in chosen]
        self._count_missing(rows, kept, reason)
        return kept

    def _count_missing(self, rows: Sequence[SafetyRow], kept: Sequence[SafetyRow], reason: str) -> None:
        missing = Counter(row.source for row in rows) - Counter(row.source for row in kept)
        for source, count in missing.items():
            self.counts[source][reason] += count

    # --- writing

    def write(self, parts: Mapping[str, Sequence[SafetyRow]], folder: Path) -> dict[str, Any]:
        """Writes all files into a new folder, the manifest last; returns the manifest."""
        folder.mkdir()
        placer = ImagePlacer(self.recipe.images, self.root, folder, self.index, progress=self.progress)
        splits = {}
        for name, rows in parts.items():
            rows, images = placer.place(rows)
            path = folder / f"{name}.jsonl"
            write_safevlm_jsonl(rows, path, placer.base)
            splits[name] = {
                "file": path.name,
                "sha256": file_sha256(path),
                **count_labels(rows, self.labels),
                "images": images,
            }
        path = folder / "dropped.jsonl"
        lines = (json.dumps(asdict(entry), ensure_ascii=False) + "\n" for entry in self.dropped)
        path.write_text("".join(lines), encoding="utf-8", newline="\n")
        manifest = {
            "format": MANIFEST_FORMAT,
            "recipe": self.recipe.to_dict(),
            "labels": labels_dict(self.labels),
            "inputs": self.inputs,
            "image_paths": "relative to this folder" if self.recipe.images == "copy" else "relative to the data root",
            "sources": {
                name: {
                    "read": count,
                    "left_out": dict(sorted(self.counts[name].items())),
                    "chosen": sum(row.source == name for rows in parts.values() for row in rows),
                }
                for name, count in self.read_counts.items()
            },
            "test_rows_skipped": self.test_rows_skipped,
            "dropped": {"file": path.name, "sha256": file_sha256(path), "rows": len(self.dropped)},
            "splits": splits,
            "versions": {name: version(name) for name in _LIBRARIES},
        }
        text = json.dumps(manifest, indent=2, ensure_ascii=False) + "\n"
        (folder / MANIFEST).write_text(text, encoding="utf-8", newline="\n")
        return manifest

    def _portable(self, text: str) -> str:
        """`text` without the data root, so that the output does not depend on where the data is."""
        return text.replace(str(self.root) + os.sep, "")


def _label_missing(row: SafetyRow) -> str | None:
    if row.category is None or row.level is None:
        return "has no category or level; label it, or set `assume_safe` for a source of clean rows"
    return None


def _marker_in_text(row: SafetyRow) -> str | None:
    if any(IMAGE_MARKER in turn for turn in question_of(row)):
        return f"a user turn spells {IMAGE_MARKER}, which the output cannot hold"
    return None


def _totals(counts: Mapping[str, Counter[str]]) -> str:
    total = sum(counts.values(), Counter())
    return ", ".join(f"{count} {reason}" for reason, count in sorted(total.items())) or "none was read"
