"""The settings of a run of `safevlm evaluate`. Only the standard library is imported."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class EvaluationSettings:
    """
    Args:
        data (`str` or `os.PathLike`): Folder of local copies (see the README of `evaluation`).
        output (`str` or `os.PathLike`): Folder for the results.
        limit (`int`, *optional*): Use only the first `limit` items of each task.
        judge (`str`): `"rules"`, `"openai:MODEL"` or `"hf:ID"` (see [`make_judge`]).
        seed (`int`): Seed of sampled answers and of intervals.
        batch_size (`int`): Items asked at once.
        max_new_tokens (`int`, *optional*): Caps the tasks' own answer lengths.
        device (`str`, *optional*): By default the first GPU, or the CPU if there is none.
        dtype (`str`): Of the weights; `"auto"` keeps the checkpoint's.
        command (`str`): What the user typed, recorded in the results.
    """

    data: str | os.PathLike
    output: str | os.PathLike
    limit: int | None = None
    judge: str = "rules"
    seed: int = 0
    batch_size: int = 8
    max_new_tokens: int | None = None
    device: str | None = None
    dtype: str = "auto"
    command: str = ""

    def __post_init__(self):
        object.__setattr__(self, "data", Path(self.data))
        object.__setattr__(self, "output", Path(self.output))

    def check(self, tasks: Sequence[str]) -> None:
        """Raises `ValueError` for settings that cannot work with `tasks`."""
        if not self.data.is_dir():
            raise ValueError(f"--data {str(self.data)!r} is not a folder.")
        if self.limit is not None and self.limit < 1:
            raise ValueError(f"--limit must be 1 or more, got {self.limit}.")
        if self.limit is not None and self.limit % 2 and "mme" in tasks:
            raise ValueError(f"--limit {self.limit}: MME scores its questions in pairs; use an even limit.")

    def of_answers(self) -> dict:
        """The settings that answers depend on; a run with other ones does not continue in the same folder."""
        return {
            "data": str(self.data.resolve()),
            "limit": self.limit,
            "seed": self.seed,
            "batch_size": self.batch_size,
            "max_new_tokens": self.max_new_tokens,
            "dtype": self.dtype,
        }
