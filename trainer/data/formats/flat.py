"""Flat data sets: each record is one row, and a taxonomy names its fields; in preference sets, the chosen answer."""

from __future__ import annotations

import functools
from pathlib import PurePosixPath
from urllib.parse import unquote, urlsplit

from safevlm.trainer.data.errors import DataError
from safevlm.trainer.data.taxonomy import Taxonomy, shipped_taxonomies

from .fields import identifier, image_list, is_empty, optional_text, single_turn, text_field
from .row_format import Context, RowFormat


def _parse(record: dict, *, context: Context, **_) -> dict:
    taxonomy = context.taxonomy
    fields = taxonomy.fields
    images = _images(record, fields)
    if not images and "question" not in fields:
        raise DataError("the image is missing, and without one this data set has no question; drop the row")
    question = text_field(record, fields["question"]) if "question" in fields else taxonomy.prompt
    answer, system = (optional_text(record, fields.get(name)) for name in ("answer", "system"))
    row = {"images": images, "messages": single_turn(len(images), question, answer, system)}
    if "id" in fields and record.get(fields["id"]) is not None:
        row["row_id"] = identifier(record, fields["id"])
    return {**row, "facts": {**record, **context.facts}, "used": set(fields.values())}


def _images(record: dict, fields: dict[str, str]) -> list:
    """The row's image; none if the field is absent, null, or (in a csv file) empty."""
    name = fields.get("image") or fields.get("image_url")
    if name is None or is_empty(record.get(name)):
        return []
    if "image_url" in fields:
        path = PurePosixPath(unquote(urlsplit(text_field(record, name)).path))
        return image_list(path.name, name)
    return image_list(record[name], name)


@functools.cache
def flat_formats() -> dict[str, RowFormat]:
    """The formats of the shipped taxonomies of flat sets, by name."""
    taxonomies = [Taxonomy.load(name) for name in shipped_taxonomies()]
    flat = [taxonomy for taxonomy in taxonomies if taxonomy.format == "flat"]
    return {taxonomy.name: RowFormat(taxonomy.recognises, _parse) for taxonomy in flat}


FLAT = RowFormat(lambda record: False, _parse)  # for a user's taxonomy that names the fields
