"""Folders with data files and images, on disk or in a zip. Zips are read in place, see `archives`."""

from __future__ import annotations

import os
import stat
from pathlib import Path, PurePosixPath
from typing import BinaryIO

from safevlm.trainer.data.archives import ArchivedImage, open_archive, split_archive_path
from safevlm.trainer.data.errors import DataError, short

from .data_files import DATA_SUFFIXES, MAX_DATA_BYTES


class DiskFolder:
    """A folder on disk."""

    def __init__(self, root: Path) -> None:
        self.root = Path(os.path.abspath(root))

    def data_files(self) -> list[str]:
        names = (path.relative_to(self.root).as_posix() for path in self.root.rglob("*") if path.is_file())
        return sorted(filter(_is_data_file, names))

    def open(self, name: str) -> BinaryIO:
        path = self.root / name
        if not stat.S_ISREG(os.stat(path).st_mode):  # a pipe would block forever
            raise DataError(f"{path}: is not a regular file; check the path.")
        return path.open("rb")

    def image(self, name: str) -> Path:
        """The path of an image. Links are not resolved: the folder's owner made them, but the data file wrote `..`."""
        path = Path(os.path.normpath(self.root / name))
        if not path.is_relative_to(self.root):
            raise _leaves_folder(name, self.root)
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
            raise _leaves_folder(name, self.root)
        return ArchivedImage(self.archive, member)


Folder = DiskFolder | ZipFolder


def find_data_files(path: Path) -> tuple[Folder, list[str]]:
    """The data files of a path (a file, a folder, a zip, or `archive.zip/inside`): their folder and their names in it.

    Raises:
        `DataError`: A folder or zip without data files.
    """
    in_archive = split_archive_path(path)
    if in_archive is not None:
        archive, inner = in_archive
        if inner in open_archive(archive).members:
            parent = str(PurePosixPath(inner).parent)
            return ZipFolder(archive, "" if parent == "." else parent), [PurePosixPath(inner).name]
        folder: Folder = ZipFolder(archive, inner)
    elif path.is_dir():
        folder = DiskFolder(path)
    else:
        return DiskFolder(path.parent), [path.name]
    names = folder.data_files()
    if not names:
        raise DataError(f"{path}: holds no data file ({', '.join(DATA_SUFFIXES)}); check the path.")
    return folder, names


def find_image_folder(path: str | os.PathLike) -> Folder:
    """A folder of images: on disk, a zip, or `archive.zip/inside`.

    Raises:
        `DataError`: It is none of these.
    """
    path = Path(path)
    in_archive = split_archive_path(path)
    if in_archive is not None:
        return ZipFolder(*in_archive)
    if not path.is_dir():
        raise DataError(f"`image_folder` {os.path.abspath(path)!r} is not a folder.")
    return DiskFolder(path)


def _leaves_folder(name: str, root: Path) -> DataError:
    return DataError(f"`image` {short(name)} leaves `image_folder` {str(root)!r}; pass the folder it is in")


def _is_data_file(name: str) -> bool:
    parts = PurePosixPath(name).parts
    hidden = any(part.startswith(".") or part == "__MACOSX" for part in parts)  # macOS adds `__MACOSX` to zips
    return not hidden and PurePosixPath(name).suffix.lower() in DATA_SUFFIXES
