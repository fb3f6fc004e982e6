"""What stands between visitors and the model: limits, uploads treated as hostile, errors that give nothing away."""

from __future__ import annotations

import logging
import threading
import time
import uuid
from collections import OrderedDict, deque
from pathlib import Path

from pictures import PictureError, load_picture
from PIL import Image

logger = logging.getLogger("safevlm.space")

MAX_ASPECT_RATIO = 200  # image processors scale the shorter side up: a thin strip would become gigabytes
MAX_ADDRESSES = 10_000


class Refused(Exception):
    """A request that cannot be served as it is; the message is for the visitor."""


def explain(error: Exception) -> str:
    """What a visitor may read about an error: of an unexpected one, only the reference it is logged under."""
    if isinstance(error, Refused):
        return str(error)
    reference = uuid.uuid4().hex[:8]
    logger.error("Request %s failed", reference, exc_info=error)
    return f"Something went wrong on our side. If it happens again, report reference {reference}."


def read_picture(path: str, uploads: str, max_mb: int, max_megapixels: int) -> Image.Image:
    """
    Decodes an upload into an upright RGB picture, as every other road to the model does.

    Args:
        path (`str`): Where Gradio says it put the upload. A client can name any path, so it must lie in `uploads`.
        uploads (`str`): The folder that Gradio puts uploads into.

    Raises:
        `Refused`: It is too large, no picture of a usual format, or damaged.
    """
    file = Path(path).resolve()
    if not file.is_relative_to(Path(uploads).resolve()) or not file.is_file():
        raise Refused("The picture did not arrive. Upload it again.")
    if file.stat().st_size > max_mb * 2**20:
        raise Refused(f"This file is larger than {max_mb} MB. Upload a smaller one.")
    try:
        # As bytes: what a decoder says about them cannot name a path.
        image = load_picture(file.read_bytes(), max_pixels=max_megapixels * 1_000_000)
    except PictureError as error:
        raise Refused(_plain_reason(error.reason, max_megapixels)) from None
    if max(image.size) > MAX_ASPECT_RATIO * min(image.size):
        raise Refused(f"This picture is too thin: one side may be {MAX_ASPECT_RATIO} times the other. Crop it.")
    return image


def _plain_reason(reason: str, max_megapixels: int) -> str:
    if "too large" in reason or "more than" in reason:
        return f"This picture has too many pixels; {max_megapixels} megapixels is the limit. Upload a smaller one."
    if "not a readable" in reason:
        return "This file is not a picture we can read. Use PNG, JPEG, WebP, GIF, BMP, TIFF or PPM."
    if "no agreed range" in reason:
        return "This picture's pixel format is unusual (32 bit or signed). Convert it to 8 bit per channel."
    return "This picture is damaged or incomplete. Save it again and upload the new file."


class RateLimiter:
    """
    At most `limit` requests per address in any `window` seconds.

    Args:
        limit (`int`): Requests.
        window (`float`): Seconds.
        clock (`Callable[[], float]`): Seconds, monotonic.
    """

    def __init__(self, limit: int, window: float = 60.0, clock=time.monotonic):
        self.limit, self.window, self.clock = limit, window, clock
        self._times: OrderedDict[str, deque[float]] = OrderedDict()
        self._lock = threading.Lock()

    def check(self, address: str, cost: int = 1):
        """
        Raises:
            `Refused`: `cost` more requests would be too many; they are not counted.
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
