"""Writes labelled rows of the picture world as files, for commands such as `safevlm calibrate`."""

import os
from dataclasses import replace
from pathlib import Path

from safevlm import SafetyPolicy
from safevlm.trainer.data import write_safevlm_jsonl

from .answers import to_row
from .picture_world.examples import make_examples

DEV_SEED_OFFSET = 9_000_011  # a random stream of its own, apart from the dev scenes that choices were made on


def write_dev_rows(folder: str | os.PathLike, seed: int, num_pictures: int = 500) -> Path:
    """
    Writes `rows.jsonl` and its pictures: dev scenes, on which no model was trained or tested.

    Args:
        folder (`str` or `os.PathLike`): Gets `rows.jsonl` and `images/`.
        seed (`int`): The demo's.

    Returns:
        `Path`: The data file. Image paths in it are relative to its folder.
    """
    folder = Path(folder)
    (folder / "images").mkdir(parents=True, exist_ok=True)
    policy = SafetyPolicy()
    rows = []
    for example in make_examples("dev", num_pictures, seed + DEV_SEED_OFFSET):
        name = example.row_id.removesuffix(f"-{example.kind}")  # a pair shares its picture
        path = folder / "images" / f"{name}.png"
        if not rows or rows[-1].images != (path,):
            example.image.save(path, compress_level=1)
        rows.append(replace(to_row(example, policy), images=(path,)))
    write_safevlm_jsonl(rows, folder / "rows.jsonl")
    return folder / "rows.jsonl"
