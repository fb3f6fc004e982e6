"""What protects the model from visitors: limits on uploads and request rates, and errors that give nothing away."""

from __future__ import annotations

import logging
import threading
import time
import uuid
from collections import OrderedDict, deque
from pathlib import Path

from pictures import PictureError, PictureFormatError, PictureTooLarge, PixelTypeError, load_picture
from PIL import Image

logger = logging.getLogger("safevlm.space")

# Image processors enlarge the shorter side of a picture: a very thin strip would grow to gigabytes.
MAX_ASPECT_RATIO = 200
MAX_ADDRESSES = 10_000  # that are remembered; the one seen longest ago is forgotten first


class Refused(Exception):
    """A request that is turned away. The message is shown to the visitor."""


def explain(error: Exception) -> str:
    """The message about an error that a visitor sees. An unexpected error is logged, and shown as a reference only."""
    if isinstance(error, Refused):
        return str(error)
    reference = uuid.uuid4().hex[:8]
    logger.error("Request %s failed", reference, exc_info=error)
    return f"Something went wrong on our side. If it happens again, report reference {reference}."


def read_picture(path: str, uploads: str, max_mb: int, max_megapixels: int) -> Image.Image:
    """
    Decodes an upload into an upright RGB picture, as all other ways into the model do.

    Args:
        path (`str`): Where Gradio says it stored the upload. Clients can name any path, so it must be in `uploads`.
        uploads (`str`): The folder where Gradio stores uploads.

    Raises:
        `Refused`: The file is missing, too large, damaged, or not a picture in a common format.
    """
    file = Path(path).resolve()
    if not file.is_relative_to(Path(uploads).resolve()) or not file.is_file():
        raise Refused("The picture did not arrive. Upload it again.")
    if file.stat().st_size > max_mb * 2**20:
        raise Refused(f"This file is larger than {max_mb} MB. Upload a smaller one.")
    try:
        # From bytes, so that no decoder's message can contain a path.
        image = load_picture(file.read_bytes(), max_pixels=max_megapixels * 1_000_000)
    except PictureTooLarge:
        limit = f"{max_megapixels} megapixels is the limit"
        raise Refused(f"This picture has too many pixels; {limit}. Upload a smaller one.") from None
    except PictureFormatError:
        formats = "PNG, JPEG, WebP, GIF, BMP, TIFF or PPM"
        raise Refused(f"This file is not a picture we can read. Use {formats}.") from None
    except PixelTypeError:
        kind = "pixel format is unusual (32 bit or signed)"
        raise Refused(f"This picture's {kind}. Convert it to 8 bit per channel.") from None
    except PictureError:
        raise Refused("This picture is damaged or incomplete. Save it again and upload the new file.") from None
    if max(image.size) > MAX_ASPECT_RATIO * min(image.size):
        ratio = f"one side may be at most {MAX_ASPECT_RATIO} times as long as the other"
        raise Refused(f"This picture is too thin: {ratio}. Crop it.")
    return image


class RateLimiter:
    """
    Allows at most `limit` requests per address within any `window` seconds.

    Args:
        limit (`int`): Number of requests.
        window (`float`): In seconds.
        clock (`Callable[[], float]`): A monotonic clock, in seconds.
    """

    def __init__(self, limit: int, window: float = 60.0, clock=time.monotonic):
        self.limit, self.window, self.clock = limit, window, clock
        self._times: OrderedDict[str, deque[float]] = OrderedDict()
        self._lock = threading.Lock()

    def check(self, address: str, cost: int = 1):
        """
        Raises:
            `Refused`: `cost` more requests would exceed the limit. Refused requests are not counted.
        """
        now = self.clock()
        with self._lock:
            times = self._times.setdefault(address, deque())
            self._times.move_to_end(address)
            while times and times[0] <= now - self.window:
                times.popleft()
            if len(times) + cost > self.limit:
                raise Refused(f"Too many requests: {self.limit} a minute are allowed. Wait a little and try again.")
            times.extend([now] * cost)
            while len(self._times) > MAX_ADDRESSES:
                self._times.popitem(last=False)
