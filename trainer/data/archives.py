"""Zip files, treated as hostile and never unpacked to disk: members are read in memory, by exact name, within limits.

An archive with absolute names, `..`, or a repeated name is refused as a whole: such archives are made to be read
differently by different programs. Links and encrypted members are refused when they are requested.
"""

from __future__ import annotations

import functools
import os
import stat
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from .errors import DataError

MAX_MEMBERS = 1_000_000


@dataclass(frozen=True)
class ArchivedImage(os.PathLike):
    """An image inside a zip, read when it is loaded. As a path it is `<archive>/<member>`. It can be pickled.

    Args:
        archive (`str`): The zip file.
        member (`str`): The exact name of the member.
    """

    archive: str
    member: str

    def __fspath__(self) -> str:
        return f"{self.archive}/{self.member}"

    def read(self, limit: int) -> bytes:
        """The image file's bytes.

        Raises:
            `FileNotFoundError`: There is no such member.
            `DataError`: The member is larger than `limit` bytes, a link, encrypted or damaged.
        """
        return open_archive(self.archive).read(self.member, limit)


def split_archive_path(path: str | os.PathLike) -> tuple[Path, str] | None:
    """(`a/b.zip`, `c/d`) for `a/b.zip/c/d` if `a/b.zip` is a zip file on disk; `None` for any other path."""
    path = Path(path)
    for candidate in (path, *path.parents):
        if candidate.is_file():
            with candidate.open("rb") as file:
                is_zip = file.read(4) in (b"PK\x03\x04", b"PK\x05\x06")
            return (candidate, "/".join(path.parts[len(candidate.parts) :])) if is_zip else None
    return None


def open_archive(path: str | os.PathLike) -> Archive:
    """Opens an archive; its list of members is read once per process.

    Raises:
        `DataError`: It is not a readable zip file, or has names that no honest archive has.
    """
    path = os.path.abspath(path)
    try:
        status = os.stat(path)
        # Per process: after a fork both processes would share the position of one file handle.
        return _open_archive(path, status.st_mtime_ns, status.st_size, os.getpid())
    except (OSError, zipfile.BadZipFile, NotImplementedError, ValueError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{path}: is not a readable zip file ({error}); download it again.") from None


@functools.lru_cache(maxsize=16)
def _open_archive(path: str, mtime: int, size: int, process: int) -> Archive:
    return Archive(path)


class Archive:
    """Read access to the members of one zip file; made by `open_archive`."""

    def __init__(self, path: str) -> None:
        self.path = path
        self._file = zipfile.ZipFile(path)
        infos = self._file.infolist()
        if len(infos) > MAX_MEMBERS:
            raise DataError(f"{path}: holds {len(infos)} files, more than {MAX_MEMBERS}; split it.")
        self.members: dict[str, zipfile.ZipInfo] = {}
        for info in infos:
            name = info.filename
            if name.startswith("/") or "\\" in name or ".." in name.split("/"):
                raise DataError(f"{path}: holds the unsafe name {name!r}; pack it again with relative names.")
            if name in self.members:
                raise DataError(f"{path}: holds {name!r} twice; pack it again.")
            if not info.is_dir():
                self.members[name] = info

    def open(self, name: str, limit: int) -> BinaryIO:
        """A stream of the member's bytes.

        Raises:
            `FileNotFoundError`: There is no such member.
            `DataError`: The member is larger than `limit` bytes, a link or encrypted.
        """
        info = self.members.get(name)
        if info is None:
            raise FileNotFoundError(name)
        where = f"{self.path}: {name!r}"
        if stat.S_ISLNK(info.external_attr >> 16):
            raise DataError(f"{where} is a symbolic link; pack the file itself.")
        if info.flag_bits & 0x1:
            raise DataError(f"{where} is encrypted; pack it without a password.")
        if info.file_size > limit:  # zipfile never reads more than this declared size
            raise DataError(f"{where} unpacks to {info.file_size} bytes, more than {limit}; refused.")
        try:
            return self._file.open(info)
        except (zipfile.BadZipFile, NotImplementedError, OSError) as error:
            raise DataError(f"{where} cannot be read ({error}); download the archive again.") from None

    def read(self, name: str, limit: int) -> bytes:
        """All bytes of the member. Raises what `open` raises, and `DataError` if the content is damaged."""
        with self.open(name, limit) as stream:
            try:
                return stream.read()
            except Exception as error:  # zlib.error, BadZipFile, EOFError, lzma.LZMAError, ...
                raise DataError(f"{self.path}: {name!r} is damaged ({type(error).__name__}: {error}).") from None
