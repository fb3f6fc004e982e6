"""From records to checked rows: parsing, labels, metadata, images, and what happens to bad rows."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Sequence
from typing import Any

from .containers import Container, OpenedContainer
from .containers.data_files import Item, decode
from .errors import DataError
from .formats.fields import identifier, is_empty
from .formats.row_format import Context, RowFormat
from .formats.unused_fields import unused_fields
from .images import MAX_PIXELS, ImageSource, load_image, probe_image
from .read_options import ReadOptions
from .safety_row import NOTHING_TO_TRAIN_ON, SafetyRow, label_ids
from .taxonomy import Taxonomy, UnmappedLabel

logger = logging.getLogger(__name__)

SCAN_WHEN_REMOTE = 1000  # records of a stream that are searched for further unmapped labels


class RowBuilder:
    """
    Makes the rows of one data set.

    Args:
        row_format (`RowFormat`): Parses its records.
        taxonomy (`Taxonomy`, *optional*): Maps its labels to ours.
        options (`ReadOptions`): How to read; `format` and `taxonomy` in it are ignored.
        skipped (`list`, *optional*): With `on_error="skip"`, collects `(row_id, reason)` of each row left out.
    """

    def __init__(
        self,
        row_format: RowFormat,
        taxonomy: Taxonomy | None,
        options: ReadOptions,
        skipped: list[tuple[str, str]] | None = None,
    ) -> None:
        self.row_format, self.taxonomy, self.options = row_format, taxonomy, options
        self.skipped = [] if skipped is None else skipped
        self._unmapped: dict[str, list[str]] = {}  # label -> ids of the rows that have it
        self._checked: set[ImageSource] = set()
        self._other_splits: set[str] = set()

    def rows(self, containers: Sequence[OpenedContainer]) -> Iterator[SafetyRow]:
        """The rows of all containers.

        Raises:
            `DataError`: A bad row, unless bad rows are skipped; a container without rows or of another split; labels
                that the taxonomy lacks.
        """
        num_skipped_before, num_rows = len(self.skipped), 0
        for opened in containers:
            for row in self._container_rows(opened):
                num_rows += 1
                yield row
        name = containers[0].container.name
        if len(containers) > 1:
            name = f"{name} and {len(containers) - 1} more"
        if self._unmapped:
            raise DataError(self._unmapped_message(name))
        skipped = self.skipped[num_skipped_before:]
        if not num_rows and not skipped and self._other_splits:
            wanted, others = self.options.split, sorted(self._other_splits)
            raise DataError(f"{name}: has no row of split {wanted!r}, only of {others}.")
        if skipped:
            total = num_rows + len(skipped)
            logger.warning("%s: skipped %d of %d rows, the first: %s", name, len(skipped), total, skipped[0][1])

    def _container_rows(self, opened: OpenedContainer) -> Iterator[SafetyRow]:
        container, split = opened.container, self.options.split
        if split and container.split not in ("", split):
            raise DataError(f"{container.name}: is of split {container.split!r}, `split` is {split!r}.")
        empty, scan = True, SCAN_WHEN_REMOTE
        for item in opened:
            empty = False
            yield from self._record_rows(container, opened.unit, item)
            scan -= bool(self._unmapped) and container.remote
            if scan < 0:
                break
        if empty:
            raise DataError(f"{container.name}: has no rows.")

    def _record_rows(self, container: Container, unit: str, item: Item) -> Iterator[SafetyRow]:
        place = f"{container.name}, {unit} {item.number}"
        record_id = f"{container.file_name}:{item.number}"
        try:
            record = decode(item.value)
            if record.get("id") is not None:
                record_id = identifier(record, "id")
            parsed = self.parse(record, container)
        except DataError as error:
            self._bad_row(record_id, place, error)
            return
        for fields in parsed:
            row_id = fields.pop("row_id", record_id)
            try:
                row = self.row(row_id, fields, record, container)
                if row is None or self._unmapped:  # once reading is sure to fail, only labels are collected
                    continue
                self._check(row)
            except UnmappedLabel as error:
                self._unmapped.setdefault(error.label, []).append(row_id)
            except DataError as error:
                self._bad_row(row_id, place, error)
            else:
                yield row

    def parse(self, record: dict, container: Container) -> list[dict[str, Any]]:
        """The parts of the record's rows, see `RowFormat`."""
        context = Context(container.stem, container.facts, self.taxonomy)
        parsed = self.row_format.parse(
            record, labels=self.options.labels, assume_safe=self.options.assume_safe, context=context
        )
        return [parsed] if isinstance(parsed, dict) else parsed

    def row(self, row_id: str, parts: dict[str, Any], record: dict, container: Container) -> SafetyRow | None:
        """
        The row of one record, or one of several.

        Args:
            parts (`dict`): What the format made of the record, see `RowFormat`.

        Returns:
            `SafetyRow`, or `None` if the row is of another split than the one asked for.
        """
        fields = dict(parts)
        if (used := fields.pop("used", None)) is not None:
            fields["metadata"] = self._metadata(fields, record, used)
        own_split, wanted = fields.pop("split", ""), self.options.split
        if own_split and wanted not in (None, own_split):
            self._other_splits.add(own_split)
            return None
        default_split = container.split or (self.taxonomy.split if self.taxonomy else "")
        fields["split"] = own_split or wanted or default_split
        facts = fields.pop("facts", None)
        if facts is not None and self.taxonomy is not None:
            category, level, dependent = self.taxonomy.label({**facts, "$split": fields["split"]})
            fields["category"], fields["level"] = label_ids(category, level, self.options.labels)
            fields["question_dependent"] = dependent
        fields["images"] = [_image(image, container) for image in fields["images"]]
        if self.options.source is not None or not fields.get("source"):
            fields["source"] = self._source(container)
        return SafetyRow(row_id=row_id, **fields)

    def _metadata(self, parts: dict[str, Any], record: dict, used: set[str]) -> dict[str, Any]:
        """The fields that nothing used; an error if one of them carries a picture, a turn or a label."""
        known = self.taxonomy.metadata if self.taxonomy else frozenset()
        used = used | {"id"} | (self.taxonomy.label_fields if self.taxonomy else set())
        kept = {name: record[name] for name in sorted(known - used) if not is_empty(record.get(name))}
        rest = unused_fields(record, used | known, has_images=bool(parts["images"]))
        metadata = {**parts.get("metadata", {}), **kept}
        if repeated := sorted(rest.keys() & metadata.keys()):
            raise DataError(f"the fields {repeated} are in `metadata`, too; keep one of each")
        return {**metadata, **rest}

    def _source(self, container: Container) -> str:
        if self.options.source is not None:
            return self.options.source
        if self.taxonomy is not None:
            return self.taxonomy.name
        return container.stem or container.name

    def _check(self, row: SafetyRow) -> None:
        """Raises `DataError` if the row has nothing to train on or a bad image, as far as the options ask for it."""
        if self.options.require_answer and not row.is_trainable:
            raise DataError(NOTHING_TO_TRAIN_ON)
        if self.options.check_images == "none":
            return
        check = load_image if self.options.check_images == "full" else probe_image
        max_pixels = MAX_PIXELS if self.options.max_pixels is None else self.options.max_pixels
        for image in row.images:
            if image not in self._checked:
                check(image, max_pixels=max_pixels, row_id=row.row_id)
                if not isinstance(image, bytes):  # remembering bytes would keep every image in memory
                    self._checked.add(image)

    def _bad_row(self, row_id: str, place: str, error: DataError) -> None:
        error.args = (f"{place}: {error}",)
        if self.options.on_error == "raise":
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
    """The source of an image: names are looked up in the image folder, embedded bytes are the image itself."""
    if isinstance(image, dict):
        image = image.get("bytes") or image["path"]
    return container.find_image(image) if isinstance(image, (str, os.PathLike)) else image
