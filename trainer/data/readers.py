"""From data files and Hub data sets to `SafetyRow`s: one loop over records, whatever holds them.

A *container* (`containers`, `hub`) yields records and finds their images; a *format* (`formats`) turns one record into
the parts of one or several rows; a *taxonomy* maps the set's own labels to ours. Formats are recognised by content.
No row is altered silently: a bad one raises `DataError`, or with `on_error="skip"` is left out and listed in
`Rows.skipped`. Unlike the reference loader (method.md, fault 5), `image_folder` is respected, and unreadable images
are never replaced.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from safevlm.files import is_hub_id
from safevlm.safety_labels import PAPER_LABELS, SafetyLabels

from .containers.container import Container
from .containers.data_files import DATA_SUFFIXES, Item, decode
from .containers.files import image_finder, one_set, open_files
from .containers.hub import open_hub
from .errors import DataError, short
from .formats import format_of, known_formats
from .images import MAX_PIXELS
from .row_builder import RowBuilder
from .safety_row import SafetyRow
from .taxonomy import Taxonomy, shipped_taxonomies

_RECOGNISE_WITHIN = 1000  # records looked at to recognise the format


class Rows(list[SafetyRow]):
    """The rows read, in file order. `skipped` holds `(row_id, reason)` for each row left out by `on_error="skip"`."""

    def __init__(self, rows: Sequence[SafetyRow] = (), skipped: Sequence[tuple[str, str]] = ()) -> None:
        super().__init__(rows)
        self.skipped = list(skipped)


def read_rows(
    path: str | os.PathLike,
    image_folder: str | os.PathLike | None = None,
    *,
    format: str | None = None,
    taxonomy: str | os.PathLike | None = None,
    split: str | None = None,
    subset: str | None = None,
    revision: str | None = None,
    labels: SafetyLabels = PAPER_LABELS,
    assume_safe: bool = False,
    require_answer: bool = True,
    check_images: Literal["full", "header", "none"] = "full",
    max_pixels: int = MAX_PIXELS,
    on_error: Literal["raise", "skip"] = "raise",
    source: str | None = None,
) -> Rows:
    """Reads a data set of any known format into a list.

    Args:
        path (`str` or `os.PathLike`): A JSON, JSONL, csv or parquet file, a folder or zip with one
            (`archive.zip/inside` names a part of it), or a Hub id `owner/name`.
        image_folder (`str` or `os.PathLike`, *optional*): A folder, a zip or `archive.zip/inside`. Image paths are
            relative to it and may not leave it; absolute ones must lie inside. Symbolic links inside a folder are
            followed, those in zips are refused. Defaults to the folder of `path`, or to `path` if it is a folder.
        format (`str`, *optional*): A known format or flat set by name; recognised from the content when omitted.
        taxonomy (`str` or `os.PathLike`, *optional*): How the set's labels map to ours: a YAML file, or the name of a
            shipped one. Defaults to the format's own.
        split (`str`, *optional*): The split: chosen on the Hub, from the data files of a folder or from the rows of
            a set that names it in each; otherwise it is the rows' `split`.
        subset, revision (`str`, *optional*): On the Hub, the configuration, and the branch, tag or commit.
        labels (`SafetyLabels`, *optional*): The names of categories and levels. Integer labels in the file are indices
            into them. Defaults to the paper's.
        assume_safe (`bool`, *optional*, defaults to `False`): Whether chat-like rows without labels become safe,
            level 0. Otherwise their `category` and `level` are `None`.
        require_answer (`bool`, *optional*, defaults to `True`): Whether a row must teach something: an answer, or a
            label, which trains the head alone. `False` reads what evaluation needs, questions alone, too.
        check_images (`"full"`, `"header"` or `"none"`, *optional*, defaults to `"full"`): `"full"` decodes every image
            once, some milliseconds each, so that training cannot stop at a broken one hours later; `"header"` finds
            missing files, refused formats and sizes; `"none"` looks at no file.
        max_pixels (`int`, *optional*, defaults to 50,000,000): Largest image, width x height.
        on_error (`"raise"` or `"skip"`, *optional*, defaults to `"raise"`): What to do with a bad row.
        source (`str`, *optional*): The rows' `source`. Defaults to the set's name, else to the file's name without
            extension, or the Hub id.

    Returns:
        `Rows`: A list of `SafetyRow`. A row's id is the record's `id`, else `"<file name>:<number>"`, counting
        lines (JSONL), items (list) or rows (tables) from 1.

    Raises:
        `DataError`: A bad row with `on_error="raise"`; an unreadable file or folder, an unknown or ambiguous format,
            or labels that the taxonomy lacks (all of them are listed) in any case. It is an `ImageError` where the
            image is at fault.
    """
    # All keyword arguments, which `iter_rows` has, too.
    options = {name: value for name, value in locals().items() if name not in ("path", "image_folder")}
    skipped: list[tuple[str, str]] = []
    rows = Rows(iter_rows(path, image_folder, streaming=False, skipped=skipped, **options))
    rows.skipped = skipped
    return rows


def iter_rows(
    path: str | os.PathLike,
    image_folder: str | os.PathLike | None = None,
    *,
    streaming: bool = True,
    skipped: list[tuple[str, str]] | None = None,
    format: str | None = None,
    taxonomy: str | os.PathLike | None = None,
    split: str | None = None,
    subset: str | None = None,
    revision: str | None = None,
    labels: SafetyLabels = PAPER_LABELS,
    assume_safe: bool = False,
    require_answer: bool = True,
    check_images: Literal["full", "header", "none"] = "full",
    max_pixels: int = MAX_PIXELS,
    on_error: Literal["raise", "skip"] = "raise",
    source: str | None = None,
) -> Iterator[SafetyRow]:
    """As `read_rows`, row by row: memory and waiting do not grow with the set (JSON lists excepted).

    Args:
        streaming (`bool`, *optional*, defaults to `True`): Whether a Hub data set is read as it is downloaded.
        skipped (`list`, *optional*): With `on_error="skip"`, gets `(row_id, reason)` of each row left out.

    Raises:
        `DataError`: Options, files and format are checked at once, rows as they come. At a label that the taxonomy
            lacks, the rest is looked through (of a stream, the next 1,000 records) to list all such labels.
    """
    _check_choice("on_error", on_error, ("raise", "skip"))
    _check_choice("check_images", check_images, ("full", "header", "none"))
    loaded = None if taxonomy is None else Taxonomy.load(taxonomy, labels)
    if format is None and loaded is not None:
        format = loaded.format
    if format is not None:
        _check_choice("format", format, sorted(known_formats()))
    containers = [_Opened(one) for one in _open(path, image_folder, split, subset, revision, streaming)]
    format = format or _recognise(path, containers)
    row_format = known_formats()[format]
    if len(containers) > 1 and not row_format.spans_files and not one_set([opened.container for opened in containers]):
        names = ", ".join(opened.container.name for opened in containers)
        raise DataError(f"{path}: holds {len(containers)} data files; pass one of them, or `split`: {names}.")
    if loaded is None and format in shipped_taxonomies():
        loaded = Taxonomy.load(format, labels)
    if format == "safevlm" and loaded is not None:
        raise ValueError("`taxonomy` is for sets with labels of their own; format 'safevlm' has ours.")
    if format == "flat" and loaded is None:
        raise ValueError("`format='flat'` needs a `taxonomy`, which names the fields.")
    builder = RowBuilder(
        row_format=row_format,
        taxonomy=loaded,
        split=split,
        labels=labels,
        assume_safe=assume_safe,
        require_answer=require_answer,
        check_images=check_images,
        max_pixels=max_pixels,
        on_error=on_error,
        source=source,
        skipped=[] if skipped is None else skipped,
    )
    return builder.rows([(opened.container, opened.unit, opened.items()) for opened in containers])


def _check_choice(name: str, value: Any, allowed: Sequence[str]) -> None:
    if value not in allowed:
        raise ValueError(f"`{name}` must be one of {allowed}, got {value!r}.")


def read_safevlm_jsonl(path: str | os.PathLike, image_folder: str | os.PathLike | None = None, **options) -> Rows:
    """Reads PSA-VLM/SafeVLM rows: `safe_type`, `safe_level`, `image`, `conversations` (roles USER and ASSISTANT).

    Both labels are required, as an index or a name. `a<split>b` in `image` means two images. Options as `read_rows`.
    """
    return read_rows(path, image_folder, format="safevlm", **options)


def read_llava_json(path: str | os.PathLike, image_folder: str | os.PathLike | None = None, **options) -> Rows:
    """Reads LLaVA-Instruct rows: `id`, `image` (path, list, or missing), `conversations` (roles human and gpt).

    An optional `system_prompt` becomes the system turn. Rows usually have no labels: see `assume_safe`. Options as
    `read_rows`.
    """
    return read_rows(path, image_folder, format="llava", **options)


def detect_format(path: str | os.PathLike) -> str:
    """The name of the known format that a data set is in, from its first recognisable record.

    Raises:
        `DataError`: It cannot be read, or no format, or several, match.
    """
    return _recognise(path, [_Opened(container) for container in _open(path)])


def _open(path, image_folder=None, split=None, subset=None, revision=None, streaming=True) -> list[Container]:
    on_hub = is_hub_id(path) and not os.path.exists(path) and not path.endswith((*DATA_SUFFIXES, ".zip"))
    if on_hub:
        image = None if image_folder is None else image_finder(image_folder)
        return [open_hub(path, split, subset, revision, streaming, image)]
    for name, value in (("subset", subset), ("revision", revision)):
        if value is not None:
            raise ValueError(f"`{name}` is for data sets on the Hub, and {str(path)!r} is a path.")
    return open_files(path, image_folder, split)


class _Opened:
    """A container being read: what was looked at to recognise the format is given again."""

    def __init__(self, container: Container) -> None:
        self.container = container
        self.unit, self._items = container.open()
        self._seen: list[Item] = []

    def peek(self) -> Iterator[Item]:
        for item in itertools.islice(self._items, _RECOGNISE_WITHIN):
            self._seen.append(item)
            yield item

    def items(self) -> Iterator[Item]:
        seen, self._seen = self._seen, []
        return itertools.chain(seen, self._items)


def _recognise(path: Any, containers: list[_Opened]) -> str:
    """The one format that fits the first record that any format fits, the same for all files."""
    if len(containers) == 1:
        return _recognise_one(containers[0])
    found = {}
    for opened in containers:
        try:
            found[opened.container.name] = _recognise_one(opened)
        except DataError:
            found[opened.container.name] = "no known format"
    if len(set(found.values())) == 1 and "no known format" not in found.values():
        return next(iter(found.values()))
    listed = ", ".join(f"{name} ({format_name})" for name, format_name in found.items())
    raise DataError(f"{path}: holds {len(found)} data files; pass one of them: {listed}.")


def _recognise_one(opened: _Opened) -> str:
    first, name = None, opened.container.name
    empty, reason = True, ""
    for item in opened.peek():
        empty = False
        try:
            record = decode(item.value)
        except DataError as error:
            reason = reason or f" ({opened.unit} {item.number}: {error})"
            continue
        first = record if first is None else first
        try:
            if (found := format_of(record)) is not None:
                return found
        except DataError as error:
            raise DataError(f"{name}: {error}.") from None
    if empty:
        raise DataError(f"{name}: has no rows.")
    keys = (
        f"no JSON object, one per line or in a list{reason}"
        if first is None
        else f"the keys {short(sorted(map(str, first)))}"
    )
    raise DataError(
        f"{name}: has no known format, it has {keys}; known formats are {sorted(known_formats())}. "
        "Choose one with `format`, or name the fields in a `taxonomy`."
    )


def row_from_record(record: Mapping[str, Any], labels: SafetyLabels = PAPER_LABELS, row_id: str = "row") -> SafetyRow:
    """
    A row of any known format, such as `{"messages": [{"role": "user", "content": "What is this?"}, ...],
    "images": [image], "category": "privacy", "level": "high"}`.

    Args:
        record (`Mapping`): `images` (or `image`) holds paths, relative to the working directory, `bytes`,
            `{"bytes", "path"}` or PIL images; labels are in `safe_type` and `safe_level` or in `category` and `level`,
            as index or name. Images are not looked at.
        labels (`SafetyLabels`, *optional*): The names of categories and levels.
        row_id (`str`, *optional*): Names the row, unless the record has an `id`.

    Raises:
        `DataError`: The record is of no known format, makes several rows, or something in it is wrong.
    """
    try:
        if not isinstance(record, Mapping):
            raise DataError(f"a row must be a mapping or a `SafetyRow`, got {short(record)}")
        return _row_from_record(dict(record), labels, row_id)
    except DataError as error:
        where = f"row {row_id!r}: "
        raise DataError(where + str(error).removeprefix(where).rstrip(".") + ".") from None


def _row_from_record(record: dict[str, Any], labels: SafetyLabels, row_id: str) -> SafetyRow:
    name = format_of(record)
    if name is None:
        raise DataError(
            f"has no known format, it has the keys {short(sorted(map(str, record)))}; give it `messages`, `images`, "
            "`category` and `level`"
        )
    taxonomy = Taxonomy.load(name, labels) if name in shipped_taxonomies() else None
    builder = RowBuilder(known_formats()[name], taxonomy, labels)
    facts = dict.fromkeys(("$file", "$folder", "$split", "$subset"), "")
    memory = Container(name="", file_name="", stem="", open=lambda: ("row", iter(())), image=Path, facts=facts)
    parsed = builder.parse(record, memory)
    if len(parsed) != 1:
        raise DataError(f"is of format {name!r} and makes {len(parsed)} rows; read such data with `read_rows`")
    (fields,) = parsed
    own_id = record.get("id")
    fallback = row_id if own_id is None else str(own_id)
    return builder.row(fields.pop("row_id", fallback), fields, record, memory)
