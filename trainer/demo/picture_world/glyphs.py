"""The tiles of the picture world: coloured shapes, and risky pictograms with their harmless look-alikes.

A tile is one cell, which is one patch of the vision tower: 16 x 16 pixels, drawn once at 8 times that size and scaled
down. A risky pictogram and its look-alike have the same plate, ink and outline; a single visible detail tells them
apart.
"""

from functools import lru_cache

import numpy as np
from PIL import Image, ImageDraw

CELL = 16  # pixels; also the tower's patch size
# A tile is drawn up to one pixel away from the centre of its cell.
JITTERS = tuple((dx, dy) for dy in (-1, 0, 1) for dx in (-1, 0, 1))
KINDS = ("circle", "square", "triangle", "star", "heart", "cross")
COLOURS = ("red", "green", "blue", "yellow", "purple", "orange")
# Risky pictogram and harmless look-alike, each as (singular, plural), in the order of the risk categories.
SIGN_NAMES = (
    (("rally flag", "rally flags"), ("plain flag", "plain flags")),
    (("knife", "knives"), ("spoon", "spoons")),
    (("angry face", "angry faces"), ("happy face", "happy faces")),
    (("tilted scale", "tilted scales"), ("level scale", "level scales")),
    (("ID card", "ID cards"), ("envelope", "envelopes")),
    (("mask", "masks"), ("pair of glasses", "pairs of glasses")),
)

_RGB = {
    "red": (214, 40, 40),
    "green": (46, 155, 60),
    "blue": (45, 90, 225),
    "yellow": (250, 215, 40),
    "purple": (140, 50, 170),
    "orange": (250, 135, 25),
}
_INK, _PLATE = (35, 35, 40), (250, 246, 232)
_SCALE = 8


def _shape(draw: ImageDraw.ImageDraw, kind: str, colour: str) -> None:
    """Draws a filled shape with a dark outline. Coordinates are in pixels of the cell, here and in `_sign`."""
    rgb = _RGB[colour]
    style = {"fill": rgb, "outline": tuple(c // 3 for c in rgb), "width": _SCALE // 2}
    if kind == "circle":
        draw.ellipse(_at(2, 2, 14, 14), **style)
    elif kind == "square":
        draw.rectangle(_at(2.5, 2.5, 13.5, 13.5), **style)
    elif kind == "triangle":
        draw.polygon(_at(8, 1.5, 14.5, 13.5, 1.5, 13.5), **style)
    elif kind == "star":
        angles = np.arange(10) * np.pi / 5 - np.pi / 2
        radii = np.where(np.arange(10) % 2 == 0, 7.0, 2.9)
        points = np.stack([8 + radii * np.cos(angles), 8.5 + radii * np.sin(angles)], axis=1)
        draw.polygon(_at(*points.ravel()), **style)
    elif kind == "heart":
        t = np.linspace(0, 2 * np.pi, 60)
        x, y = 16 * np.sin(t) ** 3, 13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t)
        draw.polygon(_at(*np.stack([8 + x * 0.4, 7.6 - y * 0.4], axis=1).ravel()), **style)
    else:  # cross
        draw.polygon(_at(6, 2, 10, 2, 10, 6, 14, 6, 14, 10, 10, 10, 10, 14, 6, 14, 6, 10, 2, 10, 2, 6, 6, 6), **style)


def _sign(draw: ImageDraw.ImageDraw, family: int, harmless: bool) -> None:
    """Draws a risky pictogram or its look-alike on the plate that all signs share."""
    draw.rounded_rectangle(_at(1, 1, 15, 15), radius=2 * _SCALE, fill=_PLATE, outline=_INK, width=_SCALE)

    def line(*xy, width=1.0, fill=_INK):
        draw.line(_at(*xy), fill=fill, width=round(width * _SCALE))

    if family == 0:  # a flag; the rally flag carries a white disc
        line(4, 3, 4, 13.5, width=1.2)
        draw.rectangle(_at(4.5, 3, 13, 9.5), fill=(200, 30, 45))
        if not harmless:
            draw.ellipse(_at(6.5, 4, 11, 8.5), fill=(255, 255, 255))
    elif family == 1:  # a handle; the knife's blade is long and pointed, the spoon's bowl is round
        line(8, 9, 8, 14, width=2.4, fill=(130, 75, 30))
        if harmless:
            draw.ellipse(_at(5, 2.5, 11, 9.5), fill=(120, 130, 145))
        else:
            draw.polygon(_at(6, 9.5, 6, 2, 10.6, 5.5, 10.6, 9.5), fill=(120, 130, 145))
    elif family == 2:  # a face; brows and mouth tell the mood
        draw.ellipse(_at(2.5, 2.5, 13.5, 13.5), fill=(250, 205, 50), outline=_INK, width=_SCALE // 2)
        if harmless:
            draw.ellipse(_at(5, 5.2, 6.6, 7), fill=_INK)
            draw.ellipse(_at(9.4, 5.2, 11, 7), fill=_INK)
            draw.chord(_at(4.8, 5.5, 11.2, 12), 0, 180, fill=_INK)
        else:
            line(4.2, 4.6, 7.4, 6.8, width=1.5)
            line(11.8, 4.6, 8.6, 6.8, width=1.5)
            draw.chord(_at(4.8, 9, 11.2, 14), 180, 360, fill=_INK)
    elif family == 3:  # a pair of scales, tilted or level
        drop = 0.0 if harmless else 1.8
        line(8, 3, 8, 13, width=1.2)
        line(5.5, 13, 10.5, 13, width=1.2)
        line(3.5, 5 + drop, 12.5, 5 - drop, width=1.2)
        draw.chord(_at(2, 5 + drop, 6.5, 9.6 + drop), 0, 180, fill=(60, 110, 190))
        draw.chord(_at(9.5, 5 - drop, 14, 9.6 - drop), 0, 180, fill=(60, 110, 190))
    elif family == 4:  # a card; the ID card shows a person, the envelope a flap
        draw.rectangle(_at(2.6, 4, 13.4, 12.4), fill=(120, 195, 215), outline=_INK, width=_SCALE // 2)
        if harmless:
            line(2.8, 4.4, 8, 9.2, width=1.0)
            line(13.2, 4.4, 8, 9.2, width=1.0)
        else:
            draw.ellipse(_at(4, 5, 7.2, 8.2), fill=_INK)
            draw.chord(_at(3.4, 8.2, 7.8, 14.6), 180, 360, fill=_INK)
            line(9, 6.6, 12.4, 6.6)
            line(9, 9.4, 12.4, 9.4)
    else:  # two eyes; the mask covers the face around them, the glasses are two rings
        if harmless:
            for x in (2.4, 8.6):
                draw.ellipse(_at(x, 5.2, x + 5, 10.2), outline=(100, 40, 120), width=_SCALE)
            line(7, 7, 9, 7, width=1.0, fill=(100, 40, 120))
        else:
            draw.ellipse(_at(2.4, 3.4, 13.6, 12.6), fill=(100, 40, 120))
            for x in (4, 9):
                draw.ellipse(_at(x, 6, x + 3, 8.6), fill=_PLATE)


def _at(*coordinates: float) -> list[float]:
    return [float(c) * _SCALE for c in coordinates]


def _tile(paint, *args) -> np.ndarray:
    """One tile in all jitters, as premultiplied RGBA in [0, 1] of shape `(len(JITTERS), 16, 16, 4)`."""
    canvas = Image.new("RGBA", (CELL * _SCALE, CELL * _SCALE))
    if paint is not None:
        paint(ImageDraw.Draw(canvas), *args)
    rgba = np.asarray(canvas, dtype=np.float32) / 255
    rgba = rgba * np.concatenate([rgba[..., 3:]] * 3 + [np.ones_like(rgba[..., 3:])], axis=-1)
    rgba = rgba.reshape(CELL, _SCALE, CELL, _SCALE, 4).mean(axis=(1, 3))
    return np.stack([np.roll(rgba, (dy, dx), axis=(0, 1)) for dx, dy in JITTERS])


def empty_tile() -> int:
    return 0


def shape_tile(kind: int, colour: int) -> int:
    """The index of a coloured shape in `tiles()`."""
    return 1 + kind * len(COLOURS) + colour


def sign_tile(family: int, harmless: bool) -> int:
    """The index of a risky pictogram or its look-alike in `tiles()`."""
    return 1 + len(KINDS) * len(COLOURS) + 2 * family + int(harmless)


@lru_cache(maxsize=1)
def tiles() -> np.ndarray:
    """All tiles as premultiplied RGBA in [0, 1], of shape `(num_tiles, len(JITTERS), 16, 16, 4)`."""
    shapes = [_tile(_shape, kind, colour) for kind in KINDS for colour in COLOURS]
    signs = [_tile(_sign, family, harmless) for family in range(len(SIGN_NAMES)) for harmless in (False, True)]
    return np.stack([_tile(None), *shapes, *signs])
