"""The picture world: scenes of 4 x 4 cells, their pictures, and the questions, answers and risk labels that go with
them.

A scene has a background, one to three coloured shapes and, at most, four signs. One to three risky pictograms of one
family make a scene risky: the family is the risk category and their number the level. Risk is a property of picture
*and* question: an ordinary question about a risky picture is safe, and so is a risky request about a picture without
risky pictograms. Every phrasing is used on every kind of picture, so neither the text nor the picture alone decides.

Splits share no scene content: train, dev and test differ in the set of coloured shapes, background and signs, not only
in where they lie or in the noise.
"""

import random
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
from PIL import Image

from safevlm.safety_labels import PAPER_LABELS

from .glyphs import CELL, COLOURS, JITTERS, KINDS, SIGN_NAMES, empty_tile, shape_tile, sign_tile, tiles
from .questions import ask_ordinary, ask_risky

Split = Literal["train", "dev", "test"]

GRID = 4  # cells per side; a picture is 64 x 64 pixels
BACKGROUNDS = {
    "white": (245, 245, 245),
    "black": (25, 25, 30),
    "grey": (140, 140, 140),
    "pink": (255, 190, 205),
    "cyan": (150, 220, 230),
}
CATEGORY_NAMES, LEVEL_NAMES = PAPER_LABELS.category_names, PAPER_LABELS.level_names
SAFE = PAPER_LABELS.safe_category_id
MAX_LEVEL = 3

RISKY_SHARE = 0.35  # of the pictures; half of them give a pair of rows
LOOKALIKE_SHARE = 0.20  # of the pictures; look-alikes only
MIXED_SHARE = 0.20  # of the risky pictures have one look-alike, too
PIXEL_NOISE = 9.0  # standard deviation, of 255
BRIGHTNESS_NOISE = 6.0  # the same, one draw per picture and channel


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
    """What a picture shows. Kinds and colours of the shapes are unique within a scene, so questions about them have
    one answer."""

    background: int
    shapes: tuple[Shape, ...]
    signs: tuple[Sign, ...]

    @property
    def category(self) -> int:
        """Risk category that a risky request about this picture has."""
        return next((sign.family for sign in self.signs if not sign.harmless), SAFE)

    @property
    def level(self) -> int:
        """Risk level, 0-3, that a risky request about this picture has."""
        return sum(not sign.harmless for sign in self.signs)

    @property
    def content(self) -> tuple:
        """The scene without positions; splits are disjoint on it."""
        shapes = tuple(sorted((kind, colour) for kind, colour, _ in self.shapes))
        return self.background, shapes, tuple(sorted((family, harmless) for family, harmless, _ in self.signs))


@dataclass(frozen=True)
class Example:
    """One row: a question about a picture, what the *unsafe* base answers, and the risk labels of the two together."""

    image: Image.Image
    question: str
    answer: str  # correct for ordinary questions, compliant for risky requests
    category: int
    level: int
    kind: Literal["clean", "risky", "lookalike", "risky_sounding", "pair_benign", "pair_risky"]
    pair_id: int | None  # shared by the two rows of a pair, which have the same picture
    row_id: str
    scene: Scene


def split_of(scene: Scene) -> Split:
    """The split that a scene's content belongs to: 80 % train, 10 % dev, 10 % test."""
    bucket = zlib.crc32(repr(scene.content).encode()) % 10
    return "test" if bucket == 9 else "dev" if bucket == 8 else "train"


def make_scenes(split: Split, num_scenes: int, seed: int) -> list[Scene]:
    """Draws `num_scenes` scenes of a split. Deterministic in its arguments; shorter lists are prefixes of longer
    ones."""
    if split not in ("train", "dev", "test"):
        raise ValueError(f"`split` must be 'train', 'dev' or 'test', got {split!r}.")
    rng = random.Random(f"scenes-{split}-{seed}")
    scenes: list[Scene] = []
    while len(scenes) < num_scenes:
        scene = _draw_scene(rng)
        if split_of(scene) == split:
            scenes.append(scene)
    return scenes


def _draw_scene(rng: random.Random) -> Scene:
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


def render(scenes: Sequence[Scene], seed: int | Sequence[int]) -> np.ndarray:
    """Draws scenes with jitter and noise: `uint8` pixels of shape `(num_scenes, 64, 64, 3)`."""
    rng = np.random.default_rng(seed)
    palette = np.array(list(BACKGROUNDS.values()), dtype=np.float32)
    size = GRID * CELL
    pixels = np.empty((len(scenes), size, size, 3), dtype=np.uint8)
    for start in range(0, len(scenes), 256):  # small chunks stay in the cache
        chunk = scenes[start : start + 256]
        index = np.full((len(chunk), GRID * GRID), empty_tile())
        for row, scene in enumerate(chunk):
            for kind, colour, cell in scene.shapes:
                index[row, cell] = shape_tile(kind, colour)
            for family, harmless, cell in scene.signs:
                index[row, cell] = sign_tile(family, harmless)
        rgba = tiles()[index, rng.integers(len(JITTERS), size=index.shape)]  # (n, 16, 16, 16, 4)
        rgba = rgba.reshape(-1, GRID, GRID, CELL, CELL, 4).swapaxes(2, 3).reshape(-1, size, size, 4)
        background = palette[[scene.background for scene in chunk], None, None]
        picture = 255 * rgba[..., :3] + background * (1 - rgba[..., 3:])
        picture += BRIGHTNESS_NOISE * rng.standard_normal((len(chunk), 1, 1, 3), dtype=np.float32)
        picture += PIXEL_NOISE * rng.standard_normal(picture.shape, dtype=np.float32)
        pixels[start : start + len(chunk)] = np.clip(picture, 0, 255).round()
    return pixels


# What a patch can show besides nothing (0): a shape kind, then each family's risky pictogram and its look-alike.
NUM_PATCH_OBJECTS = 1 + len(KINDS) + 2 * len(SIGN_NAMES)


def patch_labels(scene: Scene) -> np.ndarray:
    """Dense labels for training the vision tower: `(16, 3)` with the object, the shape's colour + 1 (else 0) and the
    background."""
    labels = np.zeros((GRID * GRID, 3), dtype=np.int64)
    labels[:, 2] = scene.background
    for kind, colour, cell in scene.shapes:
        labels[cell, :2] = 1 + kind, 1 + colour
    for family, harmless, cell in scene.signs:
        labels[cell, 0] = 1 + len(KINDS) + 2 * family + int(harmless)
    return labels


def make_examples(split: Split, num_pictures: int, seed: int) -> list[Example]:
    """Makes the rows of `num_pictures` pictures: one row each, two for the risky pictures that give a pair.

    Deterministic in its arguments. For any seeds, two splits have no scene content in common.
    """
    scenes = make_scenes(split, num_pictures, seed)
    pixels = render(scenes, seed=(seed, ("train", "dev", "test").index(split)))
    rng = random.Random(f"questions-{split}-{seed}")
    examples: list[Example] = []
    for number, scene in enumerate(scenes):
        row_id, image = f"{split}-{seed}-{number:06d}", Image.fromarray(pixels[number])
        if scene.level > 0:
            turns = {"risky": ask_risky(scene, rng)}
            if rng.random() < 0.5:
                turns = {"pair_benign": ask_ordinary(scene, rng), "pair_risky": turns["risky"]}
        else:
            # A third of the questions on pictures without signs and half of those on look-alikes sound risky.
            sounds_risky = rng.random() < (0.5 if scene.signs else 1 / 3)
            kind = "lookalike" if scene.signs else "risky_sounding" if sounds_risky else "clean"
            turns = {kind: ask_risky(scene, rng) if sounds_risky else ask_ordinary(scene, rng)}
        for kind, turn in turns.items():
            risky = kind in ("risky", "pair_risky")
            examples.append(
                Example(
                    image=image,
                    question=turn.question,
                    answer=turn.answer,
                    category=scene.category if risky else SAFE,
                    level=scene.level if risky else 0,
                    kind=kind,
                    pair_id=number if len(turns) == 2 else None,
                    row_id=f"{row_id}-{kind}" if len(turns) == 2 else row_id,
                    scene=scene,
                )
            )
    return examples
