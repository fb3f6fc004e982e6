"""Where records come from: data files (see `data_files`), alone, in a folder or in a zip.

A container gives numbered records one by one and resolves the names of images. Zips are read in place, see `archives`.
`hub` has the container for data sets on the Hub.
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import BinaryIO

from safevlm.trainer.data.archives import ArchivedImage, open_archive, split_archive_path
from safevlm.trainer.data.errors import DataError, short
from safevlm.trainer.data.images import ImageSource

from .container import Container
from .data_files import DATA_SUFFIXES, MAX_DATA_BYTES, Item, read_records

_SHARD = re.compile(r"-\d{5}-of-\d{5}$")
_SPLITS = ("train", "training", "validation", "val", "valid", "dev", "test", "eval")


class DiskFolder:
    """A folder on disk."""

    def __init__(self, root: Path) -> None:
        self.root = Path(os.path.abspath(root))

    def data_files(self) -> list[str]:
        names = (path.relative_to(self.root).as_posix() for path in self.root.rglob("*") if path.is_file())
        return sorted(filter(_is_data_file, names))

    def open(self, name: str) -> BinaryIO:
        path = self.root / name
        if not stat.S_ISREG(os.stat(path).st_mode):  # a pipe would block for ever
            raise DataError(f"{path}: is not a regular file; check the path.")
        return path.open("rb")

    def image(self, name: str) -> Path:
        """Joins lexically: a link inside the folder is its owner's choice, `..` and absolute paths the data file's."""
        path = Path(os.path.normpath(self.root / name))
        if not path.is_relative_to(self.root):
            raise DataError(
                f"`image` {short(name)} leaves `image_folder` {str(self.root)!r}; pass the folder it is in"
            )
        return path


class ZipFolder:
    """A folder inside a zip, or the whole zip."""

    def __init__(self, archive: Path, inner: str = "") -> None:
        self.archive = os.path.abspath(archive)
        self.inner = inner
        self.root = Path(self.archive, inner)

    def data_files(self) -> list[str]:
        prefix = f"{self.inner}/" if self.inner else ""
        names = (name.removeprefix(prefix) for name in open_archive(self.archive).members if name.startswith(prefix))
        return sorted(filter(_is_data_file, names))

    def open(self, name: str) -> BinaryIO:
        return open_archive(self.archive).open(str(PurePosixPath(self.inner, name)), MAX_DATA_BYTES)

    def image(self, name: str) -> ArchivedImage:
        member = os.path.normpath(f"{self.inner}/{name}" if self.inner else name)
        if name.startswith("/") or not PurePosixPath(member).is_relative_to(self.inner) or member.startswith(".."):
            raise DataError(
                f"`image` {short(name)} leaves `image_folder` {str(self.root)!r}; pass the folder it is in"
            )
        return ArchivedImage(self.archive, member)


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
    folder, names = _data_files(path)
    images = folder if image_folder is None else _image_folder(Path(image_folder))
    if len(names) > 1 and split is not None:
        names = [name for name in names if _split_of(name) == split or split in PurePosixPath(name).parts] or names
    return [_container(folder, name, images, path) for name in names]


def image_finder(image_folder: str | os.PathLike) -> Callable[[str], ImageSource]:
    """How names of images become sources: in a folder, a zip or `archive.zip/inside`.

    Raises:
        `DataError`: It is none of these.
    """
    return _image_folder(Path(image_folder)).image


def is_one_table(containers: Sequence[Container]) -> bool:
    """Whether the files are shards of one table (`train-00000-of-00002.parquet`)."""
    return len({_SHARD.sub("", container.stem) for container in containers}) == 1


def _data_files(path: Path) -> tuple[DiskFolder | ZipFolder, list[str]]:
    inside = split_archive_path(path)
    if inside is not None:
        archive, inner = inside
        if inner in open_archive(archive).members:
            parent = str(PurePosixPath(inner).parent)
            return ZipFolder(archive, "" if parent == "." else parent), [PurePosixPath(inner).name]
        folder: DiskFolder | ZipFolder = ZipFolder(archive, inner)
    elif path.is_dir():
        folder = DiskFolder(path)
    else:
        return DiskFolder(path.parent), [path.name]
    names = folder.data_files()
    if not names:
        raise DataError(f"{path}: holds no data file ({', '.join(DATA_SUFFIXES)}); check the path.")
    return folder, names


def _image_folder(path: Path) -> DiskFolder | ZipFolder:
    inside = split_archive_path(path)
    if inside is not None:
        return ZipFolder(*inside)
    if not path.is_dir():
        raise DataError(f"`image_folder` {os.path.abspath(path)!r} is not a folder.")
    return DiskFolder(path)


def _container(folder: DiskFolder | ZipFolder, name: str, images: DiskFolder | ZipFolder, path: Path) -> Container:
    pure = PurePosixPath(name)
    shown = path if pure.name == path.name else path / name

    def open_records() -> tuple[str, Iterator[Item]]:
        try:
            return read_records(lambda: folder.open(name), pure.suffix.lower(), shown)
        except DataError:
            raise
        except Exception as error:  # OSError; ValueError (a NUL in the path); what zipfile raises on damage
            reason = getattr(error, "strerror", None) or f"{type(error).__name__}: {error}"
            raise DataError(f"{shown}: cannot be read ({reason}); check the path and the file.") from error

    parent = pure.parent.name or folder.root.name
    split = _split_of(name)
    return Container(str(shown), pure.name, pure.stem, open_records, images.image, folder=parent, split=split)


def _is_data_file(name: str) -> bool:
    parts = PurePosixPath(name).parts
    hidden = any(part.startswith(".") or part == "__MACOSX" for part in parts)  # what macOS adds to zips
    return not hidden and PurePosixPath(name).suffix.lower() in DATA_SUFFIXES


def _split_of(name: str) -> str:
    stem = _SHARD.sub("", PurePosixPath(name).stem)
    return stem if stem.lower() in _SPLITS else ""
