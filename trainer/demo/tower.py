"""The vision tower's own training, standing in for CLIP pre-training: dense labels for every patch of the picture world.

Trained through the language-model loss from scratch, the tower stays blind within the demo's minutes. So it first learns what each
patch shows (object, colour, background; risky pictogram or look-alike) and is frozen afterwards, as LLaVA's is. The labels make the
risk categories easy to see by construction; levels, question-dependence and refusals are what the demo can inform about.
"""

import random
from collections.abc import Sequence

import numpy as np
import torch
from torch import nn
from tqdm.auto import tqdm
from transformers import CLIPVisionModel, get_cosine_schedule_with_warmup

from .glyphs import COLOURS
from .world import BACKGROUNDS, NUM_PATCH_OBJECTS, Scene, patch_labels


def to_pixel_values(pixels: np.ndarray) -> torch.Tensor:
    """What the processor makes of pictures of the world's own size: `(n, 64, 64, 3)` `uint8` -> `(n, 3, 64, 64)` in [-1, 1]."""
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).float().div_(127.5).sub_(1.0)


def train_tower(
    tower: CLIPVisionModel,
    scenes: Sequence[Scene],
    pixels: np.ndarray,
    *,
    steps: int,
    batch_size: int,
    learning_rate: float,
    seed: int,
    progress: bool = True,
) -> float:
    """Trains `tower` in place on the dense labels and freezes it. Returns the share of right objects in the last tenth of the steps."""
    labels = torch.from_numpy(np.stack([patch_labels(scene) for scene in scenes]))
    sizes = (NUM_PATCH_OBJECTS, 1 + len(COLOURS), len(BACKGROUNDS))
    probe = nn.Linear(tower.config.hidden_size, sum(sizes))
    parameters = [*tower.parameters(), *probe.parameters()]
    optimizer = make_optimizer(parameters, learning_rate)
    schedule = get_cosine_schedule_with_warmup(optimizer, steps // 15, steps)
    order = epochs(len(scenes), batch_size, random.Random(f"tower-{seed}"))
    tower.train()
    right: list[float] = []
    with tqdm(range(steps), desc="vision tower", disable=not progress) as bar:
        for step in bar:
            rows = next(order)
            hidden = tower(pixel_values=to_pixel_values(pixels[rows])).last_hidden_state[:, 1:]
            targets = labels[rows].flatten(0, 1)
            logits = probe(hidden).flatten(0, 1).split(sizes, dim=-1)
            loss = sum(nn.functional.cross_entropy(logits[i], targets[:, i]) for i in range(len(sizes)))
            loss.backward()
            nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            if step >= steps - max(steps // 10, 1):
                right.append((logits[0].argmax(-1) == targets[:, 0]).float().mean().item())
            if step % 25 == 0:
                bar.set_postfix(loss=f"{loss.item():.3f}")
    tower.requires_grad_(False).eval()
    return float(np.mean(right))


@torch.no_grad()
def patch_features(tower: CLIPVisionModel, pixels: np.ndarray, batch_size: int = 256) -> torch.Tensor:
    """The frozen tower's features as LLaVA reads them (last layer, without the class token): `(n, 16, hidden_size)`."""
    batches = (to_pixel_values(pixels[i : i + batch_size]) for i in range(0, len(pixels), batch_size))
    return torch.cat([tower(pixel_values=batch).last_hidden_state[:, 1:] for batch in batches])


def make_optimizer(parameters: Sequence[nn.Parameter], learning_rate: float) -> torch.optim.AdamW:
    return torch.optim.AdamW(parameters, lr=learning_rate, betas=(0.9, 0.98), weight_decay=0.01, fused=True)


def epochs(size: int, batch_size: int, rng: random.Random):
    """Endless batches of row numbers; each epoch is a new permutation, and its incomplete last batch is left out."""
    batch_size = min(batch_size, size)
    rows = list(range(size))
    while True:
        rng.shuffle(rows)
        for start in range(0, size - batch_size + 1, batch_size):
            yield rows[start : start + batch_size]
