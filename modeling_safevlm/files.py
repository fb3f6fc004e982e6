"""Files and folders that a crash never leaves half written, JSONL logs that it cannot corrupt, and digests.

Part of the package, not of the code that a saved model carries. Only the standard library: every command imports it.
"""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """
    Gives the path of a file to write beside `path`, and puts it in the place of `path` when the block ends.

    After an error or a crash the previous file is intact. The folder is made if it is missing.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    try:
        yield partial
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    os.replace(partial, path)


def replace_text(path: Path, text: str) -> None:
    """Writes `text` to `path` whole or not at all, line ends as they are."""
    with replacing(path) as partial:
        partial.write_text(text, encoding="utf-8", newline="")


def replace_json(path: Path, value: Any, **options) -> None:
    """Writes `value` to `path` as indented JSON, whole or not at all; `options` are those of `json.dumps`."""
    replace_text(path, json.dumps(value, **{"indent": 2, "ensure_ascii": False, **options}) + "\n")


def read_json(path: Path) -> dict:
    """
    The JSON object in a file.

    Raises:
        `ValueError`: It holds no JSON, or another value than an object.
    """
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{str(path)!r} is not valid JSON: {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{str(path)!r} must hold a JSON object.")
    return content


def replace_folder(write: Callable[[Path], None], folder: Path) -> None:
    """
    Calls `write(partial_folder)`, which creates that folder, then puts it in the place of `folder`.

    After a crash the previous folder is intact; between the two renames it may be missing.
    """
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    write(partial)
    old = folder.with_name(f".{folder.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        folder.rename(old)
    partial.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


class JsonLines:
    """
    An append-only log of JSON objects, one per line.

    Args:
        path (`str` or `os.PathLike`): The file; it need not exist.
    """

    def __init__(self, path: str | os.PathLike):
        self.path = Path(path)

    def read(self) -> Iterator[tuple[int, str]]:
        """
        Number (from 1) and text of each line; nothing if there is no file. A last line that a crash cut short is
        removed from the file.
        """
        if not self.path.is_file():
            return
        content = self.path.read_bytes()
        whole = content.rfind(b"\n") + 1
        if whole < len(content):
            os.truncate(self.path, whole)
        for number, line in enumerate(content[:whole].split(b"\n")[:-1], start=1):
            yield number, line.decode()

    def append(self, records: Iterable[dict]) -> None:
        """Adds a line per record. All of them are on the disk when this returns."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8", newline="\n") as file:
            file.writelines(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
            file.flush()
            os.fsync(file.fileno())


def file_sha256(path: str | os.PathLike) -> str:
    """The SHA-256 of a file of any size, as hexadecimal text."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def is_hub_id(name: Any) -> bool:
    """
    Whether a name has the form of a repository on the Hub, `owner/name`. Whether a local file has that name, too, is
    for the caller to ask first.
    """
    return isinstance(name, str) and _HUB_ID.fullmatch(name) is not None
