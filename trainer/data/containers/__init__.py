"""Where records come from: data files, alone or in folders and zips, and data sets on the Hub."""

from __future__ import annotations

import os

from safevlm.files import is_hub_id
from safevlm.trainer.data.read_options import ReadOptions

from .container import Container, OpenedContainer
from .data_files import DATA_SUFFIXES
from .files import is_one_table, open_files
from .folders import find_image_folder
from .hub import open_hub

__all__ = ["Container", "OpenedContainer", "is_one_table", "open_containers"]


def open_containers(
    path: str | os.PathLike,
    image_folder: str | os.PathLike | None = None,
    options: ReadOptions | None = None,
    streaming: bool = True,
) -> list[Container]:
    """The containers of a path or Hub id; a path that exists is never taken for a Hub id.

    Raises:
        `DataError`: There is nothing to read.
        `ValueError`: `subset` or `revision` for a path.
    """
    options = options or ReadOptions()
    if is_hub_id(path) and not os.path.exists(path) and not path.endswith((*DATA_SUFFIXES, ".zip")):
        find_image = None if image_folder is None else find_image_folder(image_folder).image
        return [open_hub(path, options.split, options.subset, options.revision, streaming, find_image)]
    for name in ("subset", "revision"):
        if getattr(options, name) is not None:
            raise ValueError(f"`{name}` is for data sets on the Hub, and {str(path)!r} is a path.")
    return open_files(path, image_folder, options.split)
