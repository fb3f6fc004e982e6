"""The two errors of bad data. Each says what is wrong, where, and what to do about it."""

from __future__ import annotations

import reprlib
from typing import Any


class DataError(ValueError):
    """A row or a whole data file cannot be used. The message names the file, line or row id, field, value and fix."""


class ImageError(DataError):
    """An image is missing, unreadable, too large or of a refused format.

    Args:
        message (`str`): The whole message. It is the only positional argument, so that the error survives pickling,
            and re-raising by PyTorch from a DataLoader worker.
        row_id (`str`, *optional*): The row that the image belongs to.
        source (`str`, *optional*): The path, or a short description of an in-memory image.
        reason (`str`, *optional*): What is wrong, without row, path or fix.
    """

    def __init__(
        self, message: str, *, row_id: str | None = None, source: str | None = None, reason: str | None = None
    ) -> None:
        super().__init__(message)
        self.row_id = row_id
        self.source = source
        self.reason = reason


def short(value: Any) -> str:
    """A `repr` short enough for an error message."""
    return reprlib.repr(value)
