"""What a record format is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from safevlm.trainer.data.taxonomy import Taxonomy


class RowFormat(NamedTuple):
    """A record format.

    Args:
        matches (`Callable[[dict], bool]`): Whether a record looks like this format, by its keys.
        parse (`Callable`): `parse(record, *, labels, assume_safe, context)` returns a dict, or a list of them for
            several rows, or raises `DataError`. Keys: `images` (names relative to the image folder, bytes, or
            `{"bytes", "path"}`) and `messages`; optional are `row_id`, `source`, `split`, `question_dependent`,
            `metadata`, and either `category` and `level` or `facts`, a dict from which the taxonomy takes the labels.
            `used` names the record's fields that went into all this: of the others those that carry pictures, turns
            or labels are refused, and the rest is the row's metadata. Take `**_` for what you don't need.
        spans_files (`bool`, *optional*, defaults to `False`): Whether all data files of a folder belong together.
    """

    matches: Callable[[dict], bool]
    parse: Callable[..., dict[str, Any] | list[dict[str, Any]]]
    spans_files: bool = False


class Context(NamedTuple):
    """Where a record comes from.

    Args:
        stem (`str`): The data file's name without extension.
        facts (`dict[str, str]`): `$file` (the stem), `$folder`, `$split`, `$subset`, for taxonomies.
        taxonomy (`Taxonomy`, *optional*): The set's labels and field names.
    """

    stem: str
    facts: dict[str, str]
    taxonomy: Taxonomy | None
