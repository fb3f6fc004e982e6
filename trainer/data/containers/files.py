"""The containers of data files: alone, in a folder or in a zip. `data_files` reads their records."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath

from safevlm.trainer.data.errors import DataError

from .container import Container
from .data_files import Item, read_records
from .folders import Folder, find_data_files, find_image_folder

_SHARD = re.compile(r"-\d{5}-of-\d{5}$")
_SPLITS = ("train", "training", "validation", "val", "valid", "dev", "test", "eval")


def open_files(
    path: str | os.PathLike, image_folder: str | os.PathLike | None = None, split: str | None = None
) -> list[Container]:
    """The data files of a path: a file, a folder, a zip, or `archive.zip/inside`.

    Args:
        image_folder (`str` or `os.PathLike`, *optional*): A folder, a zip, or `archive.zip/inside`. Defaults to the
            folder of the file, or the folder (zip) itself.
        split (`str`, *optional*): Of several data files, only those of this split.

    Raises:
        `DataError`: There is nothing to read.
    """
    path = Path(path)
    folder, names = find_data_files(path)
    images = folder if image_folder is None else find_image_folder(image_folder)
    if len(names) > 1 and split is not None:
        names = [name for name in names if _split_of(name) == split or split in PurePosixPath(name).parts] or names
    return [_container(folder, name, images, path) for name in names]


def is_one_table(containers: Sequence[Container]) -> bool:
    """Whether the files are shards of one table (`train-00000-of-00002.parquet`)."""
    return len({_SHARD.sub("", container.stem) for container in containers}) == 1


def _container(folder: Folder, name: str, images: Folder, path: Path) -> Container:
    inner_path = PurePosixPath(name)
    shown = path if inner_path.name == path.name else path / name

    def open_records() -> tuple[str, Iterator[Item]]:
        try:
            return read_records(lambda: folder.open(name), inner_path.suffix.lower(), shown)
        except DataError:
            raise
        except Exception as error:  # OSError; ValueError (a NUL in the path); zipfile's for damaged files
            reason = getattr(error, "strerror", None) or f"{type(error).__name__}: {error}"
            raise DataError(f"{shown}: cannot be read ({reason}); check the path and the file.") from error

    return Container(
        name=str(shown),
        file_name=inner_path.name,
        stem=inner_path.stem,
        open_records=open_records,
        find_image=images.image,
        folder=inner_path.parent.name or folder.root.name,
        split=_split_of(name),
    )


def _split_of(name: str) -> str:
    """The split that a file name states, or `""`."""
    stem = _SHARD.sub("", PurePosixPath(name).stem)
    return stem if stem.lower() in _SPLITS else ""
