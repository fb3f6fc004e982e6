"""What a record format is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from safevlm.trainer.data.taxonomy import Taxonomy


class RowFormat(NamedTuple):
    """A record format.

    Args:
        matches (`Callable[[dict], bool]`): Whether a record looks like this format, by its keys.
        parse (`Callable`): `parse(record, *, labels, assume_safe, context)` returns the parts of a row as a dict, or a
            list of dicts if the record makes several rows; it raises `DataError` for a bad record. Accept `**_` for
            the arguments that you don't need. The parts are:

            - `images`: names relative to the image folder, bytes, or `{"bytes", "path"}`;
            - `messages`;
            - the labels: `category` and `level`, or `facts`, a dict from which the taxonomy derives them;
            - optionally `row_id`, `source`, `split`, `question_dependent` and `metadata`;
            - optionally `used`, the names of the record's fields that went into all this. Any other field is an error
              if it carries a picture, a turn or a label, and is otherwise kept as metadata.
        spans_files (`bool`, *optional*, defaults to `False`): Whether all data files of a folder form one data set.
    """

    matches: Callable[[dict], bool]
    parse: Callable[..., dict[str, Any] | list[dict[str, Any]]]
    spans_files: bool = False


class Context(NamedTuple):
    """Where a record comes from.

    Args:
        stem (`str`): The data file's name without extension.
        facts (`dict[str, str]`): `$file` (the stem), `$folder`, `$split` and `$subset`, for taxonomies.
        taxonomy (`Taxonomy`, *optional*): The labels and field names of the data set.
    """

    stem: str
    facts: dict[str, str]
    taxonomy: Taxonomy | None
