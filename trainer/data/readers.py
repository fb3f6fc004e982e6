"""From data files, Hub data sets and Python mappings to `SafetyRow`s.

A *container* (`containers/`) yields records and finds their images. A *format* (`formats/`) turns a record into the
parts of one or several rows. A *taxonomy* (`taxonomies/`) maps the data set's own labels to ours. `row_builder`
combines them. No row is altered silently: a bad one raises `DataError`, or with `on_error="skip"` is left out and
listed in `Rows.skipped`. Unlike in the reference loader (method.md, fault 5), `image_folder` is respected, and
unreadable images are never replaced.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from safevlm.safety_labels import PAPER_LABELS, SafetyLabels

from .containers import Container, OpenedContainer, is_one_table, open_containers
from .errors import DataError, short
from .formats import format_of, known_formats
from .read_options import ReadOptions, check_choice
from .recognition import recognise_format
from .row_builder import RowBuilder
from .safety_row import SafetyRow
from .taxonomy import Taxonomy, shipped_taxonomies

DataPath = str | os.PathLike


class Rows(list[SafetyRow]):
    """The rows read, in file order. `skipped` holds `(row_id, reason)` for each row left out by `on_error="skip"`."""

    def __init__(self, rows: Sequence[SafetyRow] = (), skipped: Sequence[tuple[str, str]] = ()) -> None:
        super().__init__(rows)
        self.skipped = list(skipped)


def read_rows(
    path: DataPath | Sequence[DataPath],
    image_folder: DataPath | None = None,
    options: ReadOptions | None = None,
    **changes: Any,
) -> Rows:
    """Reads data of any known format into a list: `read_rows("rows.json", "pictures", on_error="skip")`.

    Args:
        path (`str`, `os.PathLike` or a list of them): A JSON, JSONL, csv or parquet file, a folder or zip that holds
            one (`archive.zip/inside` names a part of it), or a Hub id `owner/name`.
        image_folder (`str` or `os.PathLike`, *optional*): A folder, a zip or `archive.zip/inside`. Image paths are
            relative to it and may not leave it; absolute paths must lie inside. Symbolic links inside a folder are
            followed, those in zips are refused. Defaults to the folder of `path`, or to `path` if it is a folder.
        options (`ReadOptions`, *optional*): How to read.
        changes: Single options, which take precedence over `options`; [`ReadOptions`] lists them.

    Returns:
        `Rows`: A list of `SafetyRow`. A row's id is the record's `id`, otherwise `"<file name>:<number>"`, counting
        lines (JSONL), items (JSON lists) or rows (tables) from 1.

    Raises:
        `DataError`: A bad row with `on_error="raise"`; whatever `on_error` says, an unreadable file or folder, an
            unknown or ambiguous format, or labels that the taxonomy lacks (all of them are listed). If an image is at
            fault, it is an `ImageError`.
    """
    skipped: list[tuple[str, str]] = []
    rows = list(iter_rows(path, image_folder, options, streaming=False, skipped=skipped, **changes))
    return Rows(rows, skipped)


def iter_rows(
    path: DataPath | Sequence[DataPath],
    image_folder: DataPath | None = None,
    options: ReadOptions | None = None,
    *,
    streaming: bool = True,
    skipped: list[tuple[str, str]] | None = None,
    **changes: Any,
) -> Iterator[SafetyRow]:
    """Like `read_rows`, but row by row: memory and waiting time do not grow with the data (except for JSON lists).

    Args:
        streaming (`bool`, *optional*, defaults to `True`): Whether a Hub data set is read while it is downloaded.
        skipped (`list`, *optional*): With `on_error="skip"`, collects `(row_id, reason)` of each row left out.

    Raises:
        `DataError`: Options, files and format are checked at once, rows as they come. At the first label that the
            taxonomy lacks, the rest (of a stream, the next 1,000 records) is searched for more, to list them all.
    """
    options = replace(options or ReadOptions(), **changes)
    skipped = [] if skipped is None else skipped
    paths = [path] if isinstance(path, (str, os.PathLike)) else path
    return itertools.chain.from_iterable(
        [_iter_path(path, image_folder, options, streaming, skipped) for path in paths]
    )


def _iter_path(
    path: DataPath,
    image_folder: DataPath | None,
    options: ReadOptions,
    streaming: bool,
    skipped: list[tuple[str, str]],
) -> Iterator[SafetyRow]:
    taxonomy = None if options.taxonomy is None else Taxonomy.load(options.taxonomy, options.labels)
    format_name = options.format or (None if taxonomy is None else taxonomy.format)
    if format_name is not None:
        check_choice("format", format_name, sorted(known_formats()))
    containers = [OpenedContainer(container) for container in open_containers(path, image_folder, options, streaming)]
    format_name = format_name or recognise_format(path, containers)
    row_format = known_formats()[format_name]
    if not row_format.spans_files:
        _check_one_table(path, [opened.container for opened in containers])
    taxonomy = taxonomy or _own_taxonomy(format_name, options.labels)
    if format_name == "safevlm" and taxonomy is not None:
        raise ValueError("`taxonomy` is for sets with labels of their own; format 'safevlm' has ours.")
    if format_name == "flat" and taxonomy is None:
        raise ValueError("`format='flat'` needs a `taxonomy`, which names the fields.")
    return RowBuilder(row_format, taxonomy, options, skipped).rows(containers)


def _check_one_table(path: DataPath, containers: Sequence[Container]) -> None:
    if len(containers) > 1 and not is_one_table(containers):
        names = ", ".join(container.name for container in containers)
        raise DataError(f"{path}: holds {len(containers)} data files; pass one of them, or `split`: {names}.")


def _own_taxonomy(format_name: str, labels: SafetyLabels) -> Taxonomy | None:
    return Taxonomy.load(format_name, labels) if format_name in shipped_taxonomies() else None


def read_safevlm_jsonl(path: DataPath, image_folder: DataPath | None = None, **options: Any) -> Rows:
    """Reads PSA-VLM/SafeVLM rows: `safe_type`, `safe_level`, `image`, `conversations` (roles USER and ASSISTANT).

    Both labels are required, as an index or a name. `a<split>b` in `image` means two images. For `options` see
    [`ReadOptions`].
    """
    return read_rows(path, image_folder, format="safevlm", **options)


def read_llava_json(path: DataPath, image_folder: DataPath | None = None, **options: Any) -> Rows:
    """Reads LLaVA-Instruct rows: `id`, `image` (path, list, or missing), `conversations` (roles human and gpt).

    An optional `system_prompt` becomes the system turn. Rows usually have no labels: see `assume_safe` in
    [`ReadOptions`], which lists the other `options`, too.
    """
    return read_rows(path, image_folder, format="llava", **options)


def detect_format(path: DataPath) -> str:
    """The name of the known format that a data set is in, from its first recognisable record.

    Raises:
        `DataError`: The data cannot be read, or it fits no format or several.
    """
    return recognise_format(path, [OpenedContainer(container) for container in open_containers(path)])


def row_from_record(record: Mapping[str, Any], labels: SafetyLabels = PAPER_LABELS, row_id: str = "row") -> SafetyRow:
    """
    Makes a row of a mapping in any known format, such as `{"messages": [{"role": "user", "content": "What is this?"},
    ...], "images": [image], "category": "privacy", "level": "high"}`.

    Args:
        record (`Mapping`): `images` (or `image`) holds paths, relative to the working directory, `bytes`,
            `{"bytes", "path"}` or PIL images; labels are in `safe_type` and `safe_level` or in `category` and `level`,
            as index or name. Images are not opened.
        labels (`SafetyLabels`, *optional*): The names of categories and levels.
        row_id (`str`, *optional*): Names the row, unless the record has an `id`.

    Raises:
        `DataError`: The record is in no known format, makes several rows, or something in it is wrong.
    """
    try:
        if not isinstance(record, Mapping):
            raise DataError(f"a row must be a mapping or a `SafetyRow`, got {short(record)}")
        return _row_from_record(dict(record), labels, row_id)
    except DataError as error:
        where = f"row {row_id!r}: "
        raise DataError(where + str(error).removeprefix(where).rstrip(".") + ".") from None


def _row_from_record(record: dict[str, Any], labels: SafetyLabels, row_id: str) -> SafetyRow:
    format_name = format_of(record)
    if format_name is None:
        raise DataError(
            f"has no known format, it has the keys {short(sorted(map(str, record)))}; give it `messages`, `images`, "
            "`category` and `level`"
        )
    taxonomy = _own_taxonomy(format_name, labels)
    builder = RowBuilder(known_formats()[format_name], taxonomy, ReadOptions(labels=labels))
    memory = Container(name="", file_name="", stem="", open_records=lambda: ("row", iter(())), find_image=Path)
    parsed = builder.parse(record, memory)
    if len(parsed) != 1:
        raise DataError(f"is of format {format_name!r} and makes {len(parsed)} rows; read such data with `read_rows`")
    (fields,) = parsed
    own_id = record.get("id")
    fallback = row_id if own_id is None else str(own_id)
    return builder.row(fields.pop("row_id", fallback), fields, record, memory)
