"""What holds records: a data file, a folder, a zip, or a data set on the Hub."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from safevlm.trainer.data.images import ImageSource

from .data_files import Item


@dataclass
class Container:
    """Records and the way to their images.

    Args:
        name (`str`): In error messages.
        file_name (`str`): Begins the ids of rows that have none.
        stem (`str`): The data file's name without extension.
        open (`Callable`): Returns what a record is called (`"line"`, `"item"`, `"row"`) and an iterator of `Item`s.
        image (`Callable`): Turns an image's name into its source; raises `DataError`.
        split (`str`): The split, where file name or Hub say it.
        facts (`dict[str, str]`): For taxonomies, see `format_base.Context`.
        remote (`bool`): Whether reading on costs a download.
    """

    name: str
    file_name: str
    stem: str
    open: Callable[[], tuple[str, Iterator[Item]]]
    image: Callable[[str], ImageSource]
    split: str = ""
    facts: dict[str, str] = field(default_factory=dict)
    remote: bool = False
