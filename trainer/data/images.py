"""Loading one image of a row: the right RGB pixels, or one `ImageError` that names the row; never a substitute.

The reference code replaced unreadable images by zeros and kept their risk label (method.md, fault 5); here they are
refused. What is decoded, and how, is the processor's (processing/pictures.py): training sees what inference sees.
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
    picture_size,
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
    with _named(source, row_id) as file:
        return load_picture(file, max_pixels)


def probe_image(source: ImageSource, *, max_pixels: int = MAX_PIXELS, row_id: str | None = None) -> tuple[int, int]:
    """Reads only the header: finds missing files, refused formats and sizes, not damaged pixels.

    Returns:
        `tuple[int, int]`: Width and height in pixels as stored, before EXIF orientation.

    Raises:
        `ImageError`: As `load_image`.
    """
    with _named(source, row_id) as file:
        return picture_size(file, max_pixels)


def image_key(image: ImageSource) -> str:
    """The same key for the same file or the same content in memory. Copies of a file under two names are not found."""
    if isinstance(image, Image.Image):
        return hashlib.sha256(repr((image.mode, image.size)).encode() + image.tobytes()).hexdigest()
    if isinstance(image, bytes):
        return hashlib.sha256(image).hexdigest()
    return os.path.realpath(image)


def image_file(image: ImageSource) -> bytes | None:
    """The bytes of an image's file, wherever it lies, `None` for an image in memory; `load_image` has accepted it."""
    if isinstance(image, Image.Image):
        return None
    if isinstance(image, ArchivedImage):
        return image.read(MAX_FILE_BYTES)
    return image if isinstance(image, bytes) else Path(image).read_bytes()


@contextmanager
def _named(source: ImageSource, row_id: str | None) -> Iterator[ImageSource]:
    """What to read, taken out of its archive; errors name the row and where the image lies."""
    where = "" if row_id is None else f"row {row_id!r}: "
    try:
        yield _read_archived(source, where, row_id) if isinstance(source, ArchivedImage) else source
    except PictureError as error:
        name = repr(os.fspath(source)) if isinstance(source, ArchivedImage) else error.name
        message = f"{where}{str(error).replace(error.name, name, 1)}"
        raise ImageError(message, row_id=row_id, source=name, reason=error.reason) from error.__cause__


def _read_archived(image: ArchivedImage, where: str, row_id: str | None) -> bytes:
    try:
        return image.read(MAX_FILE_BYTES)
    except FileNotFoundError:
        reason, fix = "does not exist", "check the image folder and the row's path"
    except DataError as error:
        reason, fix = f"cannot be read ({str(error).rstrip('.')})", "repair the archive or drop the row"
    name = repr(os.fspath(image))
    raise ImageError(f"{where}image {name} {reason}; {fix}.", row_id=row_id, source=name, reason=reason) from None
