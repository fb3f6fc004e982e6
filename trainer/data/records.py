"""One record, as people write it in Python or get it from `datasets`, as a row."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safevlm.safety_labels import PAPER_LABELS, SafetyLabels

from .assembly import Assembly
from .containers import Container
from .errors import DataError
from .readers import format_of, known_formats
from .schema import SafetyRow, short
from .taxonomy import Taxonomy, shipped_taxonomies


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
        return _example(dict(record), labels, row_id)
    except DataError as error:
        where = f"row {row_id!r}: "
        raise DataError(where + str(error).removeprefix(where).rstrip(".") + ".") from None


def _example(record: dict[str, Any], labels: SafetyLabels, row_id: str) -> SafetyRow:
    name = format_of(record)
    if name is None:
        raise DataError(
            f"has no known format, it has the keys {short(sorted(map(str, record)))}; give it `messages`, `images`, "
            "`category` and `level`"
        )
    taxonomy = Taxonomy.load(name, labels) if name in shipped_taxonomies() else None
    assembly = Assembly(known_formats()[name], taxonomy, labels)
    facts = dict.fromkeys(("$file", "$folder", "$split", "$subset"), "")
    memory = Container(name="", file_name="", stem="", open=lambda: ("row", iter(())), image=Path, facts=facts)
    parsed = assembly.parse(record, memory)
    if len(parsed) != 1:
        raise DataError(f"is of format {name!r} and makes {len(parsed)} rows; read such data with `read_rows`")
    (fields,) = parsed
    own_id = record.get("id")
    fallback = row_id if own_id is None else str(own_id)
    return assembly.row(fields.pop("row_id", fallback), fields, record, memory)
