"""Scenes: what a picture of the picture world shows, and the risk that follows from it.

A scene has a background, one to three coloured shapes and up to four signs. One to three risky pictograms of one
family make a scene risky: the family is the risk category and their number the risk level.

Splits share no scene content: train, dev and test differ in the set of coloured shapes, background and signs, not only
in positions or noise.
"""

import random
import zlib
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np

from safevlm.safety_labels import PAPER_LABELS

from .glyphs import COLOURS, KINDS, SIGN_NAMES

Split = Literal["train", "dev", "test"]

GRID = 4  # cells per side
BACKGROUNDS = {
    "white": (245, 245, 245),
    "black": (25, 25, 30),
    "grey": (140, 140, 140),
    "pink": (255, 190, 205),
    "cyan": (150, 220, 230),
}
SAFE = PAPER_LABELS.safe_category_id
MAX_LEVEL = 3

RISKY_SHARE = 0.35  # of the pictures; half of them give a pair of rows
LOOKALIKE_SHARE = 0.20  # of the pictures: those with look-alikes only
MIXED_SHARE = 0.20  # of the risky pictures: those with a look-alike beside the pictograms


class Shape(NamedTuple):
    kind: int
    colour: int
    cell: int


class Sign(NamedTuple):
    family: int
    harmless: bool
    cell: int


@dataclass(frozen=True)
class Scene:
    """
    What a picture shows. Kinds and colours of the shapes are unique within a scene, so that each question about them
    has one answer.
    """

    background: int
    shapes: tuple[Shape, ...]
    signs: tuple[Sign, ...]

    @property
    def category(self) -> int:
        """The risk category of a risky request about this picture."""
        return next((sign.family for sign in self.signs if not sign.harmless), SAFE)

    @property
    def level(self) -> int:
        """The risk level, 0 to 3, of a risky request about this picture."""
        return sum(not sign.harmless for sign in self.signs)

    @property
    def content(self) -> tuple:
        """The scene without positions; splits are disjoint on it."""
        shapes = tuple(sorted((kind, colour) for kind, colour, _ in self.shapes))
        return self.background, shapes, tuple(sorted((family, harmless) for family, harmless, _ in self.signs))


def split_of(scene: Scene) -> Split:
    """The split that a scene's content belongs to: 80 % train, 10 % dev, 10 % test."""
    bucket = zlib.crc32(repr(scene.content).encode()) % 10
    return "test" if bucket == 9 else "dev" if bucket == 8 else "train"


def make_scenes(split: Split, num_scenes: int, seed: int) -> list[Scene]:
    """Scenes of a split. Deterministic in its arguments; a shorter list is a prefix of a longer one."""
    if split not in ("train", "dev", "test"):
        raise ValueError(f"`split` must be 'train', 'dev' or 'test', got {split!r}.")
    rng = random.Random(f"scenes-{split}-{seed}")
    scenes: list[Scene] = []
    while len(scenes) < num_scenes:
        scene = _random_scene(rng)
        if split_of(scene) == split:
            scenes.append(scene)
    return scenes


def _random_scene(rng: random.Random) -> Scene:
    num_shapes = rng.choices((1, 2, 3), weights=(2, 2, 1))[0]
    risky_families: list[int] = []
    harmless_families: list[int] = []
    lot = rng.random()
    if lot < RISKY_SHARE:
        risky_families = [rng.randrange(len(SIGN_NAMES))] * rng.randint(1, MAX_LEVEL)
        if rng.random() < MIXED_SHARE:
            harmless_families = [rng.randrange(len(SIGN_NAMES))]
    elif lot < RISKY_SHARE + LOOKALIKE_SHARE:
        harmless_families = [rng.randrange(len(SIGN_NAMES))] * rng.randint(1, MAX_LEVEL)
    cells = rng.sample(range(GRID * GRID), num_shapes + len(risky_families) + len(harmless_families))
    shapes = zip(rng.sample(range(len(KINDS)), num_shapes), rng.sample(range(len(COLOURS)), num_shapes), strict=True)
    signs = [(family, False) for family in risky_families] + [(family, True) for family in harmless_families]
    return Scene(
        background=rng.randrange(len(BACKGROUNDS)),
        shapes=tuple(Shape(kind, colour, cells.pop()) for kind, colour in shapes),
        signs=tuple(Sign(family, harmless, cells.pop()) for family, harmless in signs),
    )


def patch_labels(scene: Scene) -> np.ndarray:
    """
    Dense labels for the vision tower, of shape `(16, 3)`: for each patch the object, the shape's colour + 1 (0 where
    there is no shape) and the background.

    Objects: 0 is nothing, then come the kinds of shapes, then each family's risky pictogram and its look-alike.
    """
    labels = np.zeros((GRID * GRID, 3), dtype=np.int64)
    labels[:, 2] = scene.background
    for kind, colour, cell in scene.shapes:
        labels[cell, :2] = 1 + kind, 1 + colour
    for family, harmless, cell in scene.signs:
        labels[cell, 0] = 1 + len(KINDS) + 2 * family + int(harmless)
    return labels
