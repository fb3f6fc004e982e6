"""Reads one picture into the pixels that every road gives the model: 8-bit RGB, upright, transparency over white.

The processor calls it, and so does training, so that one picture gets one verdict. A picture counts as hostile: the
right pixels, or one `PictureError`; never a substitute. Formats are an allow list, so that exotic decoders (EPS runs
Ghostscript) are never started; sizes are checked before any pixel is decoded; only the first frame of an animation is
read. PIL's process-wide limits and warning filters stay as the host program set them. Colour profiles are not applied:
vision towers never saw them.
"""

import base64
import binascii
import io
import os
import stat
import threading
from contextlib import contextmanager

import numpy as np
from PIL import ExifTags, Image, ImageFile, UnidentifiedImageError

ALLOWED_FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM")
# 50 megapixels: twice the sensor of a usual phone, 150 MB as RGB.
MAX_PIXELS = 50_000_000
# An uncompressed 16-bit RGB picture of MAX_PIXELS takes 300 MB.
MAX_FILE_BYTES = 512 * 2**20

TRANSPOSE = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class PictureError(ValueError):
    """
    A picture is missing, truncated, corrupt, too large or of a refused format.

    Args:
        message (`str`): The whole message.
        name (`str`): Its path, or a short description.
        reason (`str`): What is wrong, without name or fix.
    """

    def __init__(self, message: str, name: str = "", reason: str = ""):
        super().__init__(message)
        self.name, self.reason = name, reason


class PictureTooLarge(PictureError):
    """The file has too many bytes, or the picture too many pixels."""


class PictureFormatError(PictureError):
    """The file is not a picture, or not in one of `ALLOWED_FORMATS`."""


class PixelTypeError(PictureError):
    """The pixels are of a type without an agreed range, such as signed or 32-bit integers."""


def load_picture(source, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """
    Decodes a picture into 8-bit RGB, upright, with transparency over white.

    EXIF orientation is applied and all metadata dropped, so nobody applies it twice. Unsigned 16-bit grey is scaled
    from 0-65535 to 0-255; pixel types without an agreed range (signed or 32-bit integers, floats) are refused.

    Args:
        source (`str`, `os.PathLike`, `bytes` or `PIL.Image.Image`): A path, the content of a file, or an image. An
            image is trusted in its format (its owner opened it) but not in its size. Of an animation it is the frame
            that it shows: the first one, if its owner did not choose another.
        max_pixels (`int`): Largest width x height. PIL's own limit, `2 * Image.MAX_IMAGE_PIXELS`, stays in force
            above it.

    Returns:
        `PIL.Image.Image` in mode `RGB`, independent of `source`.

    Raises:
        `PictureError`: It cannot be read.
    """
    with _refusals(source), _strict_decoding(), _opened(source, max_pixels) as image:
        image.load()
        rgb = _to_rgb(image)
        if (turn := TRANSPOSE.get(_orientation(image))) is not None:
            rgb = rgb.transpose(turn)
        rgb.info = {}
        return rgb


def picture_size(source, max_pixels: int = MAX_PIXELS) -> tuple[int, int]:
    """
    Width and height of a picture in pixels, before EXIF orientation, from its header alone: finds missing files,
    refused formats and sizes, not damaged pixels. Arguments and errors are those of [`load_picture`].
    """
    with _refusals(source), _strict_decoding(), _opened(source, max_pixels) as image:
        return image.size


def find_picture(name: str, timeout: float | None = None):
    """
    What a string of a chat or a pipeline stands for, as in transformers: a web address (fetched), a file's path, a
    data URL, or base64.

    Returns:
        `str` or `bytes`: For [`load_picture`].
    """
    if name.startswith(("http://", "https://")):
        return _fetch(name, timeout)
    if not name.startswith("data:image/"):
        # Base64 has no full stop, and no picture is so short.
        if "." in name or len(name) < 64 or os.path.isfile(name):
            return name
    try:
        return base64.b64decode("".join(name.split(",")[-1].split()), validate=True)
    except (binascii.Error, ValueError):
        short = name if len(name) <= 60 else name[:60] + "..."
        raise _error(repr(short), "is no path, web address or base64", "check the spelling") from None


def _fetch(address: str, timeout: float | None) -> bytes:
    from transformers.image_utils import httpx  # what transformers itself fetches pictures with

    content = bytearray()
    try:
        with httpx.stream("GET", address, timeout=timeout, follow_redirects=True) as response:
            response.raise_for_status()
            for piece in response.iter_bytes():
                content += piece
                if len(content) > MAX_FILE_BYTES:
                    raise _error(repr(address), f"has more than {MAX_FILE_BYTES} bytes", "shrink it", PictureTooLarge)
    except httpx.HTTPError as error:
        raise _error(repr(address), f"cannot be fetched ({error})", "check the address") from None
    return bytes(content)


class _Refused(Exception):
    """(reason, fix): turned into a `PictureError` by `_refusals`."""

    def __init__(self, reason: str, fix: str, kind: type[PictureError] = PictureError):
        super().__init__(reason, fix)
        self.kind = kind


def _error(name: str, reason: str, fix: str, kind: type[PictureError] = PictureError) -> PictureError:
    return kind(f"image {name} {reason}; {fix}.", name, reason)


@contextmanager
def _refusals(source):
    try:
        yield
    except _Refused as error:
        cause, kind, (reason, fix) = None, error.kind, error.args
    except Exception as error:  # on damaged or hostile bytes PIL's decoders raise nearly anything
        cause, kind, reason = error, PictureError, f"is truncated or corrupt ({type(error).__name__}: {error})"
        fix = "replace it"
    else:
        return
    if isinstance(source, (str, os.PathLike)):
        name = repr(os.fspath(source))
    else:
        name = f"<{len(source)} bytes>" if isinstance(source, bytes) else f"<{type(source).__name__} in memory>"
    raise _error(name, reason, fix, kind) from cause


@contextmanager
def _opened(source, max_pixels: int):
    """Opens without decoding and checks the size. Closes what it opened, and only that."""
    if isinstance(source, Image.Image):
        _check_size(source, max_pixels)
        yield source
        return
    if isinstance(source, bytes):
        _check_file_size(len(source))
        source = io.BytesIO(source)
    elif isinstance(source, (str, os.PathLike)):
        _check_file(source)
    else:
        raise _Refused("is not a path, bytes or a PIL image", "pass one of these")
    try:
        image = Image.open(source, formats=ALLOWED_FORMATS)
    except UnidentifiedImageError:
        formats = ", ".join(ALLOWED_FORMATS)
        raise _Refused(f"is not a readable {formats} file", "convert or replace it", PictureFormatError) from None
    except Image.DecompressionBombError as error:
        raise _Refused(f"is too large ({error})", "shrink it", PictureTooLarge) from None
    with image:
        _check_size(image, max_pixels)
        yield image


def _check_file(path) -> None:
    try:
        status = os.stat(path)
    except FileNotFoundError:
        if str(path).startswith(("http:/", "https:/")):  # a `Path` has one slash left
            raise _Refused("is a web address, which is not fetched", "save the picture and name its file") from None
        raise _Refused("does not exist", "check the folder and the path") from None
    except (OSError, ValueError) as error:  # ValueError: a NUL or a lone surrogate in the name
        raise _Refused(f"cannot be opened ({error})", "check the path") from None
    if not stat.S_ISREG(status.st_mode):  # a pipe would block for ever, a device never end
        raise _Refused("is not a regular file", "check the path")
    _check_file_size(status.st_size)


def _check_file_size(size: int) -> None:
    if size > MAX_FILE_BYTES:
        raise _Refused(f"has {size} bytes, more than {MAX_FILE_BYTES}", "compress or shrink it", PictureTooLarge)


def _check_size(image: Image.Image, max_pixels: int) -> None:
    width, height = image.size
    if width * height == 0:
        raise _Refused(f"is empty ({width}x{height} pixels)", "replace it")
    if width * height > max_pixels:
        reason = f"has {width}x{height} pixels, more than {max_pixels}"
        raise _Refused(reason, "shrink it or raise `max_pixels`", PictureTooLarge)


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM")):
        return _sixteen_bit_grey_to_rgb(image)
    if image.mode in ("I", "F"):
        reason = f"has pixels of mode {image.mode!r}, which have no agreed range"
        raise _Refused(reason, "convert it to 8 bit", PixelTypeError)
    if image.has_transparency_data:
        rgba = image.convert({"La": "LA"}.get(image.mode, "RGBA")).convert("RGBA")
        white = Image.new("RGBA", rgba.size, "white")
        white.alpha_composite(rgba)
        return white.convert("RGB")
    return image.convert("RGB")


def _orientation(image: Image.Image) -> int | None:
    try:
        return image.getexif().get(ExifTags.Base.Orientation)
    except Exception:  # unreadable EXIF beside sound pixels, common on the web: shown as stored, as viewers do
        return None


def _sixteen_bit_grey_to_rgb(image: Image.Image) -> Image.Image:
    # Image.convert would clip everything above 255 to white.
    values = np.asarray(image).astype(np.uint32)
    grey = ((values + 128) // 257).astype(np.uint8)  # 65535 / 255 = 257, rounded to nearest
    transparent = image.info.get("transparency")
    if isinstance(transparent, int):
        grey[values == transparent] = 255
    return Image.fromarray(grey).convert("RGB")


_strict_lock = threading.Lock()
_strict_users = 0
_host_setting = False


@contextmanager
def _strict_decoding():
    """
    Holds `ImageFile.LOAD_TRUNCATED_IMAGES` off while any thread decodes here, then restores what the host had set.

    Many training scripts switch it on for the whole process; PIL then fills the missing part with grey, silently.
    """
    global _strict_users, _host_setting
    with _strict_lock:
        if _strict_users == 0:
            _host_setting, ImageFile.LOAD_TRUNCATED_IMAGES = ImageFile.LOAD_TRUNCATED_IMAGES, False
        _strict_users += 1
    try:
        yield
    finally:
        with _strict_lock:
            _strict_users -= 1
            if _strict_users == 0:
                ImageFile.LOAD_TRUNCATED_IMAGES = _host_setting
