"""What holds records: a data file, a folder, a zip, or a data set on the Hub."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from safevlm.trainer.data.images import ImageSource

from .data_files import Item


@dataclass(frozen=True)
class Container:
    """
    Records, and a way to find their images.

    Args:
        name (`str`): Its name in error messages.
        file_name (`str`): Prefix of generated row ids.
        stem (`str`): The data file's name without extension.
        open_records (`Callable`): Returns what a record is called (`"line"`, `"item"` or `"row"`) and an iterator over
            `Item`s.
        find_image (`Callable`): Turns the name of an image into its source; raises `DataError`.
        folder (`str`): The name of the folder that holds the data file, or the Hub id.
        split (`str`): The split, if the file name or the Hub states it.
        subset (`str`): The configuration on the Hub.
        remote (`bool`): Whether reading on means downloading more.
    """

    name: str
    file_name: str
    stem: str
    open_records: Callable[[], tuple[str, Iterator[Item]]]
    find_image: Callable[[str], ImageSource]
    folder: str = ""
    split: str = ""
    subset: str = ""
    remote: bool = False

    @property
    def facts(self) -> dict[str, str]:
        """What a taxonomy may read labels from besides the record's own fields."""
        return {"$file": self.stem, "$folder": self.folder, "$split": self.split, "$subset": self.subset}


class OpenedContainer:
    """A container being read: its items come once, no matter how many were looked at before with `peek`."""

    def __init__(self, container: Container) -> None:
        self.container = container
        self.unit, self._items = container.open_records()
        self._peeked: list[Item] = []

    def peek(self, limit: int) -> Iterator[Item]:
        """The next items, at most `limit`; iterating over the container yields them again."""
        for item in itertools.islice(self._items, limit):
            self._peeked.append(item)
            yield item

    def __iter__(self) -> Iterator[Item]:
        peeked, self._peeked = self._peeked, []
        return itertools.chain(peeked, self._items)
