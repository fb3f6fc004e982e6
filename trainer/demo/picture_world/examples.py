"""The picture world: pictures of scenes, with questions, answers and risk labels.

Risk belongs to picture *and* question: an ordinary question about a risky picture is safe, and so is a risky request
about a picture without risky pictograms. Every phrasing is used with every kind of picture, so neither the text nor
the picture alone decides.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from PIL import Image

from safevlm.safety_labels import PAPER_LABELS

from .glyphs import CELL, JITTERS, empty_tile, shape_tile, sign_tile, tiles
from .questions import ask_ordinary, ask_risky
from .scene import BACKGROUNDS, GRID, SAFE, Scene, Split, make_scenes

CATEGORY_NAMES, LEVEL_NAMES = PAPER_LABELS.category_names, PAPER_LABELS.level_names

PIXEL_NOISE = 9.0  # standard deviation, of 255
BRIGHTNESS_NOISE = 6.0  # likewise, one draw per picture and channel


@dataclass(frozen=True)
class Example:
    """A question about a picture, the answer of the *unsafe* base, and the risk labels of question and picture."""

    image: Image.Image
    question: str
    answer: str  # correct for ordinary questions, compliant with risky requests
    category: int
    level: int
    kind: Literal["clean", "risky", "lookalike", "risky_sounding", "pair_benign", "pair_risky"]
    pair_id: int | None  # shared by the two rows of a pair, which have the same picture
    row_id: str
    scene: Scene


def render(scenes: Sequence[Scene], seed: int | Sequence[int]) -> np.ndarray:
    """Pictures of scenes, with jitter and noise, as `uint8` pixels of shape `(num_scenes, 64, 64, 3)`."""
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


def make_examples(split: Split, num_pictures: int, seed: int) -> list[Example]:
    """
    The examples of `num_pictures` pictures: one each, or two for a risky picture that gives a pair.

    Deterministic in its arguments. Whatever the seeds, two splits have no scene content in common.
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
