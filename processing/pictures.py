"""Reads one picture into the pixels that the model gets on every road: 8-bit RGB, upright, transparency over white.

The processor and training both call it, so that one picture gets one verdict. Every picture is treated as hostile:
the result is the right pixels or a `PictureError`, never a substitute. Only the formats of an allow list are decoded,
so that exotic decoders never start (EPS runs Ghostscript). Sizes are checked before any pixel is decoded, and only the
first frame of an animation is read. PIL's process-wide limits and warning filters stay as the host program set them.
Colour profiles are not applied: vision towers were trained without them.
"""

import base64
import binascii
import io
import os
import stat
import threading
from contextlib import contextmanager

import numpy as np
from PIL import ExifTags, Image, ImageFile, ImageOps, UnidentifiedImageError

ALLOWED_FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM")
# 50 megapixels: twice the sensor of a usual phone, 150 MB as RGB.
MAX_PIXELS = 50_000_000
# An uncompressed 16-bit RGB picture of MAX_PIXELS takes 300 MB.
MAX_FILE_BYTES = 512 * 2**20


class PictureError(ValueError):
    """
    A picture is missing, truncated, corrupt or otherwise unusable.

    Args:
        name (`str`): The picture's path, or a short description.
        reason (`str`): What is wrong, without name and fix.
        fix (`str`): What to do about it.
    """

    def __init__(self, name: str, reason: str, fix: str):
        super().__init__(name, reason, fix)
        self.name, self.reason, self.fix = name, reason, fix

    def __str__(self) -> str:
        return f"image {self.name} {self.reason}; {self.fix}."


class PictureTooLarge(PictureError):
    """The file has too many bytes, or the picture too many pixels."""


class PictureFormatError(PictureError):
    """The file is not a picture, or not in one of `ALLOWED_FORMATS`."""


class PixelTypeError(PictureError):
    """The pixels are of a type without an agreed range, such as signed or 32-bit integers."""


def load_picture(source, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """
    Decodes a picture.

    The EXIF orientation is applied and all metadata is dropped, so that nobody applies it twice. Unsigned 16-bit grey
    is scaled from 0-65535 to 0-255.

    Args:
        source (`str`, `os.PathLike`, `bytes` or `PIL.Image.Image`): A path, the content of a file, or an image. An
            image may have any format (its owner chose to open it), but not any size. Of an animation, the frame that
            it currently shows is read.
        max_pixels (`int`): Largest width x height. PIL's own limit, `2 * Image.MAX_IMAGE_PIXELS`, also applies.

    Returns:
        `PIL.Image.Image` in mode `RGB`, independent of `source`.

    Raises:
        `PictureError`: The picture cannot be read.
    """
    with open_picture(source, max_pixels) as image:
        image.load()
        rgb = _to_rgb(image, _name(source))
        rgb.info = {}
        if (orientation := _orientation(image)) is not None:
            rgb.getexif()[ExifTags.Base.Orientation] = orientation
            rgb = ImageOps.exif_transpose(rgb)
        return rgb


@contextmanager
def open_picture(source, max_pixels: int = MAX_PIXELS):
    """
    A picture as PIL opens it, with its size checked and no pixels decoded: finds missing files, refused formats and
    sizes. Arguments are those of [`load_picture`]. Whatever goes wrong here or in the body of the `with` statement is
    raised as a `PictureError`. Closes what it opened, and only that.
    """
    name = _name(source)
    try:
        with _strict_decoding():
            if isinstance(source, Image.Image):
                _check_size(source, max_pixels, name)
                yield source
            else:
                with Image.open(_checked_file(source, name), formats=ALLOWED_FORMATS) as image:
                    _check_size(image, max_pixels, name)
                    yield image
    except PictureError:
        raise
    except UnidentifiedImageError:
        reason = f"is not a readable {', '.join(ALLOWED_FORMATS)} file"
        raise PictureFormatError(name, reason, "convert or replace it") from None
    except Image.DecompressionBombError as error:
        raise PictureTooLarge(name, f"is too large ({error})", "shrink it") from None
    except Exception as error:  # on damaged or hostile bytes PIL's decoders raise nearly anything
        reason = f"is truncated or corrupt ({type(error).__name__}: {error})"
        raise PictureError(name, reason, "replace it") from error


def find_picture(name: str, timeout: float | None = None) -> str | bytes:
    """
    Resolves a string in a chat or a pipeline call as transformers does: a web address (which is fetched), a path, a
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
        raise PictureError(repr(short), "is no path, web address or base64", "check the spelling") from None


def _fetch(address: str, timeout: float | None) -> bytes:
    from transformers.image_utils import httpx  # the client with which transformers itself fetches pictures

    content = bytearray()
    try:
        with httpx.stream("GET", address, timeout=timeout, follow_redirects=True) as response:
            response.raise_for_status()
            for piece in response.iter_bytes():
                content += piece
                if len(content) > MAX_FILE_BYTES:
                    raise PictureTooLarge(repr(address), f"has more than {MAX_FILE_BYTES} bytes", "shrink it")
    except httpx.HTTPError as error:
        raise PictureError(repr(address), f"cannot be fetched ({error})", "check the address") from None
    return bytes(content)


def _name(source) -> str:
    if isinstance(source, (str, os.PathLike)):
        return repr(os.fspath(source))
    return f"<{len(source)} bytes>" if isinstance(source, bytes) else f"<{type(source).__name__} in memory>"


def _checked_file(source, name: str):
    """`source` as `Image.open` takes it."""
    if isinstance(source, bytes):
        file, size = io.BytesIO(source), len(source)
    elif isinstance(source, (str, os.PathLike)):
        file, size = source, _file_size(source, name)
    else:
        raise PictureError(name, "is not a path, bytes or a PIL image", "pass one of these")
    if size > MAX_FILE_BYTES:
        raise PictureTooLarge(name, f"has {size} bytes, more than {MAX_FILE_BYTES}", "compress or shrink it")
    return file


def _file_size(path, name: str) -> int:
    try:
        status = os.stat(path)
    except FileNotFoundError:
        if str(path).startswith(("http:/", "https:/")):  # a `Path` keeps only one slash
            reason, fix = "is a web address, which is not fetched", "save the picture and name its file"
        else:
            reason, fix = "does not exist", "check the folder and the path"
        raise PictureError(name, reason, fix) from None
    except (OSError, ValueError) as error:  # ValueError: a NUL or a lone surrogate in the name
        raise PictureError(name, f"cannot be opened ({error})", "check the path") from None
    if not stat.S_ISREG(status.st_mode):  # a pipe would block forever, a device would never end
        raise PictureError(name, "is not a regular file", "check the path")
    return status.st_size


def _check_size(image: Image.Image, max_pixels: int, name: str) -> None:
    width, height = image.size
    if width * height == 0:
        raise PictureError(name, f"is empty ({width}x{height} pixels)", "replace it")
    if width * height > max_pixels:
        reason = f"has {width}x{height} pixels, more than {max_pixels}"
        raise PictureTooLarge(name, reason, "shrink it or raise `max_pixels`")


def _to_rgb(image: Image.Image, name: str) -> Image.Image:
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM")):
        return _sixteen_bit_grey_to_rgb(image)
    if image.mode in ("I", "F"):
        reason = f"has pixels of mode {image.mode!r}, which have no agreed range"
        raise PixelTypeError(name, reason, "convert it to 8 bit")
    if image.has_transparency_data:
        rgba = image.convert({"La": "LA"}.get(image.mode, "RGBA")).convert("RGBA")
        white = Image.new("RGBA", rgba.size, "white")
        white.alpha_composite(rgba)
        return white.convert("RGB")
    return image.convert("RGB")


def _sixteen_bit_grey_to_rgb(image: Image.Image) -> Image.Image:
    # Image.convert would clip everything above 255 to white.
    values = np.asarray(image).astype(np.uint32)
    grey = ((values + 128) // 257).astype(np.uint8)  # 65535 / 255 = 257, rounded to nearest
    transparent = image.info.get("transparency")
    if isinstance(transparent, int):
        grey[values == transparent] = 255
    return Image.fromarray(grey).convert("RGB")


def _orientation(image: Image.Image) -> int | None:
    try:
        return image.getexif().get(ExifTags.Base.Orientation)
    except Exception:  # unreadable EXIF beside sound pixels is common on the web; viewers show these as stored
        return None


_strict_lock = threading.Lock()
_strict_users = 0
_host_setting = False


@contextmanager
def _strict_decoding():
    """
    Keeps `ImageFile.LOAD_TRUNCATED_IMAGES` off while any thread decodes here, then restores the host's setting.

    Many training scripts switch it on for the whole process; PIL then silently fills the missing part with grey.
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
