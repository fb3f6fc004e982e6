"""Loads one image of a row: the right RGB pixels, or an `ImageError` that names the row; never a substitute.

The paper's code replaced unreadable images by zeros and kept their risk label (method.md, fault 5); here they are
refused. The processor decodes them (processing/pictures.py), so training sees what inference sees.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from PIL import Image

from safevlm.processing.pictures import (
    ALLOWED_FORMATS,
    MAX_FILE_BYTES,
    MAX_PIXELS,
    PictureError,
    load_picture,
    open_picture,
)

from .archives import ArchivedImage
from .errors import DataError, ImageError

__all__ = [
    "ALLOWED_FORMATS",
    "MAX_FILE_BYTES",
    "MAX_PIXELS",
    "ImageSource",
    "image_file",
    "image_key",
    "load_image",
    "probe_image",
]

# What `load_image` takes: a path, the bytes of a file, an image in a zip (`ArchivedImage`, a PathLike), or in memory.
ImageSource = str | os.PathLike | bytes | Image.Image


def load_image(source: ImageSource, *, max_pixels: int = MAX_PIXELS, row_id: str | None = None) -> Image.Image:
    """Decodes an image as [`load_picture`] does.

    Args:
        source (`str`, `os.PathLike`, `bytes` or `PIL.Image.Image`): A path, the content of an image file, an
            [`ArchivedImage`], or an image.
        max_pixels (`int`, *optional*, defaults to 50,000,000): Largest width x height.
        row_id (`str`, *optional*): The row named in the error.

    Returns:
        `PIL.Image.Image` in mode `RGB`, independent of `source`.

    Raises:
        `ImageError`: The image is missing, truncated, corrupt, too large or of a refused format.
    """
    with _row_errors(source, row_id):
        return load_picture(_unpacked(source), max_pixels)


def probe_image(source: ImageSource, *, max_pixels: int = MAX_PIXELS, row_id: str | None = None) -> tuple[int, int]:
    """Reads only the header: finds missing files, refused formats and sizes, but no damaged pixels.

    Returns:
        `tuple[int, int]`: Width and height in pixels as stored, before EXIF orientation.

    Raises:
        `ImageError`: As `load_image`.
    """
    with _row_errors(source, row_id):
        with open_picture(_unpacked(source), max_pixels) as image:
            return image.size


def _unpacked(source: ImageSource) -> ImageSource:
    """What `load_picture` reads: an archived image as bytes, anything else unchanged."""
    if not isinstance(source, ArchivedImage):
        return source
    name = repr(os.fspath(source))
    try:
        return source.read(MAX_FILE_BYTES)
    except FileNotFoundError:
        raise PictureError(name, "does not exist", "check the image folder and the row's path") from None
    except DataError as error:
        reason = f"cannot be read ({str(error).rstrip('.')})"
        raise PictureError(name, reason, "repair the archive or drop the row") from None


def image_key(image: ImageSource) -> str:
    """A key that paths of the same file share, or equal images in memory. A copy of a file has a key of its own."""
    if isinstance(image, Image.Image):
        return hashlib.sha256(repr((image.mode, image.size)).encode() + image.tobytes()).hexdigest()
    if isinstance(image, bytes):
        return hashlib.sha256(image).hexdigest()
    return os.path.realpath(image)


def image_file(image: ImageSource) -> bytes | None:
    """The bytes of an image's file; `None` for an image in memory. `load_image` must have accepted the image."""
    if isinstance(image, Image.Image):
        return None
    if isinstance(image, ArchivedImage):
        return image.read(MAX_FILE_BYTES)
    return image if isinstance(image, bytes) else Path(image).read_bytes()


@contextmanager
def _row_errors(source: ImageSource, row_id: str | None) -> Iterator[None]:
    """Turns a `PictureError` into an `ImageError` that names the row and the image's path."""
    try:
        yield
    except PictureError as error:
        name = repr(os.fspath(source)) if isinstance(source, ArchivedImage) else error.name
        where = "" if row_id is None else f"row {row_id!r}: "
        message = f"{where}image {name} {error.reason}; {error.fix}."
        raise ImageError(message, row_id=row_id, source=name, reason=error.reason) from error.__cause__
