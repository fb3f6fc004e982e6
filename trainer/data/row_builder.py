"""From records to checked rows: parsing, labels, images, and what happens with those that are bad."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from safevlm.safety_labels import SafetyLabels

from .containers.container import Container
from .containers.data_files import Item, decode
from .errors import DataError
from .formats.fields import identifier
from .formats.row_format import Context, RowFormat
from .formats.unused_fields import is_empty, other_fields
from .images import MAX_PIXELS, ImageSource, load_image, probe_image
from .safety_row import SafetyRow, label_ids
from .taxonomy import Taxonomy, UnmappedLabel

logger = logging.getLogger(__name__)

SCAN_WHEN_REMOTE = 1000  # records of a stream looked through for further unmapped labels


@dataclass
class RowBuilder:
    """Makes the rows of one data set. The arguments are those of `read_rows`, checked and resolved."""

    row_format: RowFormat
    taxonomy: Taxonomy | None
    labels: SafetyLabels
    split: str | None = None
    assume_safe: bool = False
    require_answer: bool = True
    check_images: str = "full"
    max_pixels: int = MAX_PIXELS
    on_error: str = "raise"
    source: str | None = None
    skipped: list[tuple[str, str]] = field(default_factory=list)
    _unmapped: dict[str, list[str]] = field(default_factory=dict)  # label -> the rows that have it
    _checked: set[ImageSource] = field(default_factory=set)
    _other_splits: set[str] = field(default_factory=set)

    def rows(self, parts: Sequence[tuple[Container, str, Iterable[Item]]]) -> Iterator[SafetyRow]:
        """The rows of all parts: a container, what it calls a record, and its records."""
        first_skipped, read, made = len(self.skipped), 0, 0
        for container, unit, items in parts:
            read_before = read
            if self.split and container.split not in ("", self.split):
                raise DataError(f"{container.name}: is of split {container.split!r}, `split` is {self.split!r}.")
            scan = SCAN_WHEN_REMOTE
            for item in items:
                read += 1
                for row in self._record(container, unit, item):
                    made += 1
                    yield row
                scan -= bool(self._unmapped) and container.remote
                if scan < 0:
                    break
            if read == read_before:
                raise DataError(f"{container.name}: has no rows.")
        name = parts[0][0].name if len(parts) == 1 else f"{parts[0][0].name} and {len(parts) - 1} more"
        if self._unmapped:
            raise DataError(self._unmapped_message(name))
        skipped = self.skipped[first_skipped:]
        if not made and not skipped and self._other_splits:
            raise DataError(f"{name}: has no row of split {self.split!r}, only of {sorted(self._other_splits)}.")
        if skipped:
            total = made + len(skipped)
            logger.warning("%s: skipped %d of %d rows, the first: %s", name, len(skipped), total, skipped[0][1])

    def _record(self, container: Container, unit: str, item: Item) -> Iterator[SafetyRow]:
        place = f"{container.name}, {unit} {item.number}"
        row_id = f"{container.file_name}:{item.number}"
        try:
            record = decode(item.value)
            if record.get("id") is not None:
                row_id = identifier(record, "id")
            parsed = self.parse(record, container)
        except DataError as error:
            self._bad(row_id, place, error)
            return
        for fields in parsed:
            own_id = fields.pop("row_id", row_id)
            try:
                row = self.row(own_id, fields, record, container)
                if row is None or self._unmapped:  # no row is given once it is clear that reading will fail
                    continue
                self._check(row)
            except UnmappedLabel as error:
                self._unmapped.setdefault(error.label, []).append(own_id)
            except DataError as error:
                self._bad(own_id, place, error)
            else:
                yield row

    def parse(self, record: dict, container: Container) -> list[dict[str, Any]]:
        """The parts of the record's rows, see `RowFormat`."""
        context = Context(container.stem, container.facts, self.taxonomy)
        parsed = self.row_format.parse(record, labels=self.labels, assume_safe=self.assume_safe, context=context)
        return [parsed] if isinstance(parsed, dict) else parsed

    def row(self, row_id: str, fields: dict[str, Any], record: dict, container: Container) -> SafetyRow | None:
        """`None` if the row is of another split than the one asked for."""
        if (used := fields.pop("used", None)) is not None:
            self._keep_metadata(fields, record, used)
        own_split = fields.pop("split", "")
        if own_split and self.split not in (None, own_split):
            self._other_splits.add(own_split)
            return None
        default_split = container.split or (self.taxonomy.split if self.taxonomy else "")
        fields["split"] = own_split or self.split or default_split
        facts = fields.pop("facts", None)
        if facts is not None and self.taxonomy is not None:
            category, level, dependent = self.taxonomy.label({**facts, "$split": fields["split"]})
            fields["category"], fields["level"] = label_ids(category, level, self.labels)
            fields["question_dependent"] = dependent
        fields["images"] = [_image(image, container) for image in fields["images"]]
        if self.source is not None or not fields.get("source"):
            fields["source"] = self._source(container)
        return SafetyRow(row_id=row_id, **fields)

    def _keep_metadata(self, fields: dict[str, Any], record: dict, used: set[str]) -> None:
        """What no one read is the row's metadata, unless it carries a picture, a turn or a label."""
        known = self.taxonomy.metadata if self.taxonomy else frozenset()
        used = used | {"id"} | (self.taxonomy.label_fields if self.taxonomy else set())
        kept = {name: record[name] for name in sorted(known - used) if not is_empty(record.get(name))}
        rest = other_fields(record, used | known, has_images=bool(fields["images"]))
        metadata = {**fields.get("metadata", {}), **kept}
        if both := sorted(rest.keys() & metadata.keys()):
            raise DataError(f"the fields {both} are in `metadata`, too; keep one of each")
        fields["metadata"] = {**metadata, **rest}

    def _source(self, container: Container) -> str:
        if self.source is not None:
            return self.source
        if self.taxonomy is not None:
            return self.taxonomy.name
        return container.stem or container.name

    def _check(self, row: SafetyRow) -> None:
        if self.require_answer and not (row.has_answer or row.is_labelled):
            raise DataError("has neither an answer nor a label; add one, or drop the row")
        if self.check_images == "none":
            return
        check = load_image if self.check_images == "full" else probe_image
        for image in row.images:
            if image not in self._checked:
                check(image, max_pixels=self.max_pixels, row_id=row.row_id)
                if not isinstance(image, bytes):  # bytes would be kept alive
                    self._checked.add(image)

    def _bad(self, row_id: str, place: str, error: DataError) -> None:
        error.args = (f"{place}: {error}",)
        if self.on_error == "raise":
            raise error
        self.skipped.append((row_id, str(error)))

    def _unmapped_message(self, name: str) -> str:
        listed = "; ".join(
            f"{label} ({len(rows)} row{'s' * (len(rows) > 1)}, the first {rows[0]!r})"
            for label, rows in sorted(self._unmapped.items())
        )
        return (
            f"{name}: the taxonomy {self.taxonomy.name!r} lacks {len(self._unmapped)} of the labels here: {listed}. "
            "Add them to a copy of its YAML file and pass that as `taxonomy`."
        )


def _image(image: Any, container: Container) -> ImageSource:
    """A name is looked up in the image folder; embedded bytes are the image."""
    if isinstance(image, dict):
        image = image.get("bytes") or image["path"]
    return container.image(image) if isinstance(image, (str, os.PathLike)) else image
