"""The checkpoints behind the systems: shared by consecutive systems, and told apart by their files."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig

from safevlm.trainer.loading import load_checkpoint

from .answering import Answerer
from .guard_models import load_guard
from .systems import System

_NOT_THE_MODEL = ("card_facts.json",)  # refreshing a model's card does not change its answers


class Checkpoints:
    """
    Keeps the model and the guard in use, so that consecutive systems share them.

    Args:
        device (`str`, *optional*), dtype (`str`): As for [`load_checkpoint`].
    """

    def __init__(self, device: str | None, dtype: str):
        self.device, self.dtype = device, dtype
        self._loaded: dict[str, tuple[str, Any]] = {}

    def answerer(self, system: System) -> Answerer:
        """Loads what the system needs, after letting go of what it does not."""
        for kind, checkpoint in (("model", system.checkpoint), ("guard", system.guard)):
            if kind in self._loaded and self._loaded[kind][0] != checkpoint:
                del self._loaded[kind]
        if "model" not in self._loaded:
            loaded = load_checkpoint(system.checkpoint, self.device, self.dtype)
            self._loaded["model"] = (system.checkpoint, loaded)
        model, processor = self._loaded["model"][1]
        guard = None
        if system.guard is not None:
            if "guard" not in self._loaded:
                self._loaded["guard"] = (system.guard, load_guard(system.guard, model.device, self.dtype))
            guard = self._loaded["guard"][1]
        return Answerer(model, processor, system.policy, system.prefix, guard)

    def clear(self) -> None:
        """Frees the memory."""
        self._loaded = {}
        torch.cuda.empty_cache()


def fingerprint(checkpoint: str) -> str:
    """Changes when the checkpoint does: from a folder's file names, sizes and times, or the commit of a Hub id."""
    folder = Path(checkpoint)
    if not folder.is_dir():
        return str(AutoConfig.from_pretrained(checkpoint)._commit_hash)
    facts = sorted(
        (str(path.relative_to(folder)), path.stat().st_size, path.stat().st_mtime_ns)
        for path in folder.rglob("*")
        if path.suffix in (".json", ".safetensors", ".jinja", ".txt") and path.name not in _NOT_THE_MODEL
    )
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]
