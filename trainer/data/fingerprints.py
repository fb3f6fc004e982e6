"""Finds images that are the same by bytes, by pixels, or to the eye (perceptual hash), among 100,000 of them.

Two images are near duplicates if their 256-bit perceptual hashes (DCT pHash of the greyscale picture, `imagehash`)
differ in at most `NEAR_DISTANCE` bits. Measured on 50 typographic attacks (FigStep) and 40 photographs: JPEG
compression down to quality 30 and halving the size change a hash by at most 8 bits, 20 % more brightness by at most
22. Different pictures are at least 50 bits apart (typographic, same layout) or 104 (photographs). The usual 64-bit
hash barely separates the typographic ones: some are within 8 bits.

Most crops are not found, nor are compressed copies of pictures without detail (JPEG changes half of the random
pictures of 6 x 6 smooth patches by 22 bits or more, but none of 12 x 12 by more than 6). Colour is ignored.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
from PIL import Image
from tqdm import tqdm

from .errors import ImageError
from .images import ImageSource, image_file, image_key, load_image
from .safety_row import SafetyRow

HASH_BITS = 256
NEAR_DISTANCE = 24
# With fewer grey values a picture has no structure to hash; it only equals itself.
_MIN_CONTRAST = 8


class Fingerprint(NamedTuple):
    """What identifies an image.

    Args:
        file_sha256 (`str`, *optional*): Hash of the file's bytes; `None` for an image in memory.
        pixel_sha256 (`str`): Hash of the size and RGB pixels that `load_image` returns, whatever the file format.
        perceptual (`bytes`, *optional*): The perceptual hash, 32 bytes; `None` if not requested or without contrast.
    """

    file_sha256: str | None
    pixel_sha256: str
    perceptual: bytes | None


def fingerprint(image: ImageSource, *, perceptual: bool = True) -> Fingerprint:
    """Decodes an image and hashes it.

    Raises:
        `ImageError`: The image cannot be loaded.
        `ImportError`: `perceptual` is set and `imagehash` is not installed.
    """
    rgb = load_image(image)
    pixels = hashlib.sha256(repr(rgb.size).encode() + rgb.tobytes()).hexdigest()
    content = image_file(image)
    file = None if content is None else hashlib.sha256(content).hexdigest()
    return Fingerprint(file, pixels, _perceptual_hash(rgb) if perceptual else None)


def near_pairs(hashes: np.ndarray, distance: int) -> np.ndarray:
    """All pairs of hashes that differ in at most `distance` bits, without comparing every hash with every other.

    Such a pair agrees in at least one of `distance + 1` bands of bits (pigeonhole principle), so only hashes that
    share a band are compared. The result is exact, and far from quadratic in time unless most images look alike.

    Args:
        hashes (`np.ndarray` of `np.uint8` and shape `(num_hashes, num_bytes)`): One hash per row, best without
            repeats; `num_bytes` is a multiple of 8.
        distance (`int`): Largest number of differing bits, at least 0 and less than the number of bits.

    Returns:
        `np.ndarray` of shape `(num_pairs, 2)`: Sorted index pairs, the smaller index first.
    """
    bits = np.unpackbits(hashes, axis=1)
    if not 0 <= distance < bits.shape[1]:
        raise ValueError(f"`distance` must be in 0..{bits.shape[1] - 1}, got {distance!r}.")
    words = np.ascontiguousarray(hashes).view(np.uint64).T
    found = [np.empty((0, 2), np.int64)]
    for band in np.array_split(bits, distance + 1, axis=1):
        # The first 62 bits of a long band suffice: more pairs are compared, and none is missed.
        keys = band[:, :62] @ (1 << np.arange(min(band.shape[1], 62)))
        order = np.argsort(keys, kind="stable")
        keys, ordered = keys[order], words[:, order]
        # Equal bands are adjacent now: compare each hash with the next, the one after that, ...
        left, step = np.arange(len(order) - 1), 1
        while len(left := left[left + step < len(order)]):
            left = left[keys[left] == keys[left + step]]
            near, differing = left, 0
            for word in ordered:  # the first word rules out most pairs
                differing = differing + np.bitwise_count(word[near] ^ word[near + step]).astype(np.int64)
                near, differing = near[differing <= distance], differing[differing <= distance]
            found.append(np.sort(np.stack([order[near], order[near + step]], axis=1), axis=1))
            step += 1
    return np.unique(np.concatenate(found), axis=0)


def near_groups(hashes: Sequence[bytes], distance: int = NEAR_DISTANCE) -> list[int]:
    """A group number per hash. Hashes near each other, directly or through others, have the same number."""
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    if not hashes:
        return []
    unique = sorted(set(hashes))
    place = {value: number for number, value in enumerate(unique)}
    pairs = near_pairs(np.frombuffer(b"".join(unique), np.uint8).reshape(len(unique), -1), distance)
    links = coo_array((np.ones(len(pairs), bool), (pairs[:, 0], pairs[:, 1])), shape=(len(unique),) * 2)
    groups = connected_components(links, directed=False)[1]
    return [int(groups[place[value]]) for value in hashes]


def hash_distance(first: bytes, second: bytes) -> int:
    """The number of bits in which two hashes differ."""
    return (int.from_bytes(first, "big") ^ int.from_bytes(second, "big")).bit_count()


class ImageIndex:
    """The fingerprints of all images of some rows. Each image is decoded once, on all cores.

    Args:
        rows (`Iterable[SafetyRow]`): Rows whose images will be looked up.
        perceptual (`bool`, *optional*, defaults to `True`): Whether to find near duplicates.
        distance (`int`, *optional*, defaults to 24): Bits, of 256, in which the hashes of near duplicates may differ.
        progress (`bool`, *optional*, defaults to `True`): Whether to show a progress bar on standard error.

    Attributes:
        num_images (`int`): Number of different images, by path, or by content if in memory.
    """

    def __init__(
        self,
        rows: Iterable[SafetyRow],
        *,
        perceptual: bool = True,
        distance: int = NEAR_DISTANCE,
        progress: bool = True,
    ) -> None:
        if not 0 <= distance < HASH_BITS:
            raise ValueError(f"`distance` must be in 0..{HASH_BITS - 1}, got {distance!r}.")
        if perceptual:
            _imagehash()
        images = {image_key(image): image for row in rows for image in row.images}
        self.num_images = len(images)
        self._entries: dict[str, Fingerprint | ImageError] = {}
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            results = pool.map(lambda image: _try_fingerprint(image, perceptual), images.values())
            bar = tqdm(results, "reading images", len(images), unit="image", disable=not progress, leave=False)
            self._entries.update(zip(images, bar, strict=True))
        hashed = {entry.pixel_sha256: entry.perceptual for entry in self._sound() if entry.perceptual is not None}
        self._groups = dict(zip(hashed, near_groups(list(hashed.values()), distance), strict=True))

    def error(self, image: ImageSource) -> ImageError | None:
        """Why an image cannot be used, or `None`."""
        entry = self._entries[image_key(image)]
        return entry if isinstance(entry, ImageError) else None

    def fingerprint(self, image: ImageSource) -> Fingerprint:
        """The fingerprint of an image.

        Raises:
            `ImageError`: The image cannot be used.
        """
        entry = self._entries[image_key(image)]
        if isinstance(entry, ImageError):
            raise entry
        return entry

    def exact(self, image: ImageSource) -> str:
        """A key that images with the same pixels share. Raises `ImageError` like `fingerprint`."""
        return self.fingerprint(image).pixel_sha256

    def group(self, image: ImageSource) -> str:
        """A key that near duplicates share, directly or through others. Raises `ImageError` like `fingerprint`."""
        pixels = self.fingerprint(image).pixel_sha256
        return f"group {self._groups[pixels]}" if pixels in self._groups else pixels

    def distance(self, first: ImageSource, second: ImageSource) -> int | None:
        """Bits, of 256, in which the perceptual hashes of two images differ; `None` if one has no such hash."""
        hashes = self.fingerprint(first).perceptual, self.fingerprint(second).perceptual
        return None if None in hashes else hash_distance(*hashes)

    def _sound(self) -> Iterator[Fingerprint]:
        return (entry for entry in self._entries.values() if isinstance(entry, Fingerprint))


def _try_fingerprint(image: ImageSource, perceptual: bool) -> Fingerprint | ImageError:
    try:
        return fingerprint(image, perceptual=perceptual)
    except ImageError as error:
        return error


def _perceptual_hash(rgb: Image.Image) -> bytes | None:
    darkest, brightest = rgb.convert("L").getextrema()
    if brightest - darkest < _MIN_CONTRAST:
        return None
    bits = _imagehash().phash(rgb, hash_size=int(HASH_BITS**0.5)).hash
    return np.packbits(bits).tobytes()


def _imagehash():
    try:
        import imagehash
    except ImportError:
        raise ImportError("near duplicates need `imagehash`: pip install 'safevlm[data]'") from None
    return imagehash
