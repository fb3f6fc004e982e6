"""The vision tower's own training on a dense label for every patch, in place of CLIP's pre-training.

Trained from scratch through the language-model loss alone, the tower learns nothing in the demo's few minutes. So it
first learns what each patch shows (object, colour and background; risky pictogram or look-alike) and is then frozen,
as LLaVA's is. These labels make the risk categories easy to see. What the demo can tell you about are risk levels,
the influence of the question, and refusals.
"""

import random
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from torch import nn
from tqdm.auto import tqdm
from transformers import CLIPVisionModel

from safevlm.trainer.demo.picture_world.glyphs import COLOURS, KINDS, SIGN_NAMES
from safevlm.trainer.demo.picture_world.scene import BACKGROUNDS, Scene, patch_labels

from .optimization import Optimizers, adamw
from .recipe import BaseRecipe


def to_pixel_values(pixels: np.ndarray) -> torch.Tensor:
    """
    Pictures of the world's own size as the processor would give them: `uint8` of shape `(n, 64, 64, 3)` becomes
    float of shape `(n, 3, 64, 64)` in [-1, 1].
    """
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).float().div_(127.5).sub_(1.0)


def train_tower(
    tower: CLIPVisionModel,
    projector: nn.Module,
    word_embedding: Callable[[str], torch.Tensor],
    scenes: Sequence[Scene],
    pixels: np.ndarray,
    recipe: BaseRecipe,
    seed: int,
    progress: bool = True,
) -> tuple[float, float]:
    """
    Trains `tower` and `projector` in place on the dense labels, then freezes the tower.

    A linear probe reads object, colour and background from each patch, and the projector is trained to give the sum
    of the embeddings of the words that name them. The latter replaces the caption stages of CLIP and LLaVA: a language
    model that finds the question's words among the image tokens learns to answer in a fraction of the steps.

    Args:
        word_embedding: Gives the embedding of some words, of shape `(hidden_size,)`.
        pixels (`np.ndarray` of shape `(num_scenes, 64, 64, 3)`): Of the scenes.

    Returns:
        `tuple[float, float]`: Over the last tenth of the steps, the share of objects recognised, in [0, 1], and the
        projector's squared error relative to one word's embedding.
    """
    steps = recipe.tower_steps
    labels = torch.from_numpy(np.stack([patch_labels(scene) for scene in scenes]))
    tables = _word_tables(word_embedding)
    sizes = [len(table) for table in tables]
    scale = 1 / tables[2].var()
    probe = nn.Linear(tower.config.hidden_size, sum(sizes))
    optimizers = Optimizers(
        [adamw([*tower.parameters(), *projector.parameters(), *probe.parameters()], recipe.tower_learning_rate)], steps
    )
    order = epochs(len(scenes), recipe.tower_batch, random.Random(f"tower-{seed}"))
    tower.train()
    right: list[float] = []
    errors: list[float] = []
    with tqdm(range(steps), desc="vision tower", disable=not progress) as bar:
        for step in bar:
            rows = next(order)
            hidden = tower(pixel_values=to_pixel_values(pixels[rows])).last_hidden_state[:, 1:].flatten(0, 1)
            targets = labels[rows].flatten(0, 1)
            logits = probe(hidden).split(sizes, dim=-1)
            probe_loss = sum(nn.functional.cross_entropy(logits[i], targets[:, i]) for i in range(len(sizes)))
            words = sum(table[targets[:, i]] for i, table in enumerate(tables))
            error = (projector(hidden) - words).square().mean(dim=-1) * scale
            shown = (targets[:, 0] > 0).float()  # three patches in four are empty, and easy
            loss = probe_loss + (error * (0.1 + shown)).sum() / (0.1 + shown).sum()
            loss.backward()
            optimizers.step()
            if step >= steps - max(steps // 10, 1):
                right.append((logits[0].argmax(-1) == targets[:, 0]).float().mean().item())
                errors.append(error.mean().item())
            if step % 25 == 0:
                bar.set_postfix(loss=f"{loss.item():.3f}")
    tower.requires_grad_(False).eval()
    return float(np.mean(right)), float(np.mean(errors))


def _word_tables(word_embedding: Callable[[str], torch.Tensor]) -> list[torch.Tensor]:
    """For each column of `patch_labels`, the sums of word embeddings of its values."""
    objects = [["background"], *([kind, "shapes"] for kind in KINDS)]
    objects += [[names[harmless][1], "signs"] for names in SIGN_NAMES for harmless in (0, 1)]
    return [
        torch.stack([torch.stack([word_embedding(word) for word in words]).sum(dim=0) for words in objects]),
        torch.stack([torch.zeros_like(word_embedding("red")), *(word_embedding(colour) for colour in COLOURS)]),
        torch.stack([word_embedding(background) for background in BACKGROUNDS]),
    ]


@torch.no_grad()
def patch_features(tower: CLIPVisionModel, pixels: np.ndarray, batch_size: int = 256) -> torch.Tensor:
    """The frozen tower's features as LLaVA reads them, without the class token, of shape `(n, 16, hidden_size)`."""
    batches = (to_pixel_values(pixels[i : i + batch_size]) for i in range(0, len(pixels), batch_size))
    return torch.cat([tower(pixel_values=batch).last_hidden_state[:, 1:] for batch in batches])


def epochs(size: int, batch_size: int, rng: random.Random) -> Iterator[list[int]]:
    """Endless batches of row numbers. Each epoch is a new permutation without its incomplete last batch."""
    batch_size = min(batch_size, size)
    rows = list(range(size))
    while True:
        rng.shuffle(rows)
        for start in range(0, size - batch_size + 1, batch_size):
            yield rows[start : start + batch_size]
