"""The settings of a run of `safevlm evaluate`. Imports nothing heavy."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from safevlm.trainer.options import option


@dataclass(frozen=True)
class EvaluationSettings:
    """
    How to evaluate. The fields' help texts are those of `safevlm evaluate --help`.

    Args:
        command (`str`): What the user typed, recorded in the results.
    """

    data: str | os.PathLike = option("folder with local copies of the data sets")
    output: str | os.PathLike = option("folder to write results to")
    limit: int | None = option("use only the first LIMIT items of each task", None)
    judge: str = option("rules, openai:MODEL or hf:ID", "rules")
    seed: int = option("seed of sampled answers and of intervals", 0)
    batch_size: int = option("items asked at once", 8)
    max_new_tokens: int | None = option("cap on the tasks' own answer lengths", None)
    device: str | None = option("cpu, cuda, ... (default: cuda if there is one)", None)
    dtype: str = option("dtype of the weights: auto (as stored), bfloat16, ...", "auto")
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
