"""Checkpoints and saved models: which one is complete, loading its weights, and saving atomically."""

import json
import os
import re
from pathlib import Path

import torch
from accelerate import PartialState
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from safevlm.files import replace_folder


def last_complete_checkpoint(folder: str | os.PathLike) -> str | None:
    """The newest checkpoint that training can resume from: not a partly written one, nor one of `save_only_model`."""
    complete = [
        (int(match.group(1)), path)
        for path in Path(folder).glob(f"{PREFIX_CHECKPOINT_DIR}-*")
        if (match := re.fullmatch(rf"{PREFIX_CHECKPOINT_DIR}-(\d+)", path.name)) and is_complete(path)
    ]
    return str(max(complete)[1]) if complete else None


def is_complete(checkpoint: str | os.PathLike) -> bool:
    """Whether a checkpoint is fully written and holds more than weights: optimizer, schedule and random states."""
    try:
        json.loads((Path(checkpoint) / TRAINER_STATE_NAME).read_text(encoding="utf-8"))  # the Trainer writes it last
    except (OSError, ValueError):
        return False
    return any(Path(checkpoint).glob("rng_state*.pth"))


def load_weights(model, checkpoint: str | os.PathLike):
    """
    Loads the weights of a checkpoint into `model`, a plain SafeVLM.

    It uses `from_pretrained` because the names in the file may differ: `save_pretrained` writes those of many base
    families in their legacy form, and `load_state_dict(strict=False)`, which `Trainer` uses, would skip the base.
    """
    # Trainable weights are in float32 and the base may not be; float32 represents both exactly.
    dtypes = {parameter.dtype for parameter in model.parameters() if parameter.is_floating_point()}
    dtype = dtypes.pop() if len(dtypes) == 1 else torch.float32
    weights = type(model).from_pretrained(checkpoint, dtype=dtype).state_dict()
    if not getattr(model, "is_quantized", False):
        model.load_state_dict(weights)
        return
    # Quantised weights never train, and cannot be copied.
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    if missing := sorted(trained - set(weights)):
        raise ValueError(f"The checkpoint {checkpoint} lacks {len(missing)} trained weights, such as {missing[0]}.")
    model.load_state_dict({name: weight for name, weight in weights.items() if name in trained}, strict=False)


def save_atomically(model, processor, folder: Path):
    """Saves a model and its processor to `folder`, atomically; a previous one stays until then."""

    def save(partial):
        model.save_pretrained(partial)
        processor.save_pretrained(partial)

    write_atomically(save, folder)


def write_atomically(write, folder: Path):
    """
    Calls `write(partial_folder)`, then puts that folder in the place of `folder`, on the main process only.

    After a crash the previous folder is intact; between the two renames it may be missing.
    """
    state = PartialState()
    if state.is_main_process:
        replace_folder(write, Path(folder))
    state.wait_for_everyone()
