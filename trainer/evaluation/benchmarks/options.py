"""Options of `safevlm evaluate`: its flags and what [`evaluate`] takes. Imports nothing heavy."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from safevlm.trainer.options import option


def comma_separated(text: str | None) -> list[str]:
    """`"a, b"` as `["a", "b"]`; empty for no text."""
    return [item.strip() for item in (text or "").split(",") if item.strip()]


@dataclass(frozen=True, kw_only=True)
class EvaluateOptions:
    """
    What to measure, on what, and how. The help texts of `safevlm evaluate --help` explain the fields.

    Args:
        tasks (`Sequence[str]`): Names of our tasks, of lmms-eval's, or of groups.
        compare (`Sequence[str]`, *optional*): See [`make_systems`].
        judge (`str`): See [`make_judge`].
        command (`str`): What the user typed, recorded in the results.
    """

    tasks: Sequence[str] = option("our tasks and groups or lmms-eval's, separated by commas", parse=comma_separated)
    data: Path = option("folder with local copies of the data sets")
    output: Path = option("folder to write results to")
    policy: str | None = option("default, paper, strict, off, or a policy file (default: the model's own)", None)
    compare: Sequence[str] | None = option(
        "more rows for the table: base, guard-prompt, stage1, stage2, presets, guard:MODEL_ID, separated by commas; "
        "base=PATH and stage1=PATH if they are not found",
        None,
        parse=comma_separated,
    )
    judge: str = option("rules, openai:MODEL or hf:ID", "rules")
    limit: int | None = option("use only the first LIMIT items of each task", None)
    batch_size: int = option("items asked at once", 8)
    max_new_tokens: int | None = option("cap on the tasks' own answer lengths", None)
    seed: int = option("seed of sampled answers and of intervals", 0)
    device: str | None = option("cpu, cuda, ... (default: cuda if there is one)", None)
    dtype: str = option("of the weights: auto, bfloat16, ...", "auto")
    command: str = field(default="")

    def check(self) -> None:
        """Raises `ValueError` for values that cannot work."""
        if not self.data.is_dir():
            raise ValueError(f"--data {str(self.data)!r} is not a folder.")
        if self.limit is not None and self.limit < 1:
            raise ValueError(f"--limit must be 1 or more, got {self.limit}.")
        if self.limit is not None and self.limit % 2 and "mme" in self.tasks:
            raise ValueError(f"--limit {self.limit}: MME scores its questions in pairs; use an even limit.")

    def of_answers(self) -> dict:
        """What answers depend on; a run that differs in it does not continue in the same folder."""
        return {
            "data": str(self.data.resolve()),
            "limit": self.limit,
            "seed": self.seed,
            "batch_size": self.batch_size,
            "max_new_tokens": self.max_new_tokens,
            "dtype": self.dtype,
        }
