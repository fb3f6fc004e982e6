"""Options of `safevlm train`: its flags and what [`train_from_files`] takes. Imports nothing heavy."""

import os
from dataclasses import dataclass, field

import yaml

from .data.read_options import ReadOptions, images_option
from .options import option
from .settings import load_settings


def parse_overrides(items: list[str]) -> dict:
    """
    Training arguments from the values of `--set`.

    Raises:
        `ValueError`: An item is not `NAME=VALUE` with a YAML value.
    """
    overrides = {}
    for item in items:
        name, equals, value = item.partition("=")
        if not equals:
            raise ValueError(f"--set {item!r} must be NAME=VALUE, such as max_steps=100.")
        try:
            overrides[name] = load_settings(value)
        except yaml.YAMLError:
            raise ValueError(f"--set {item!r}: the value is not valid YAML.") from None
    return overrides


@dataclass(frozen=True)
class TrainOptions:
    """
    What to train, on what, and how. The fields' help texts are those of `safevlm train --help`.

    Raises:
        `ValueError`: `holdout` is not in [0, 1).
    """

    base: str | os.PathLike = option("Hub id or folder of a vision-language model, or of a SafeVLM to train further")
    data: list[str | os.PathLike] = option("rows: files (JSON, JSONL, csv, parquet), folders, zips or Hub ids")
    output: str | os.PathLike = option("folder to write; the model ends up in OUTPUT/model")
    images: str | os.PathLike | None = images_option()
    recipe: str | os.PathLike = option("a shipped recipe or a YAML file", "paper")
    holdout: float = option("share of the rows, by image, to keep out of training and evaluate on; 0: none", 0.1)
    dtype: str = option("dtype of the weights: auto, float32, bfloat16, float16", "auto")
    seed: int = option("seed of weights, order and hold-out", 0)
    labels: str | os.PathLike | None = option(
        "names of categories and levels, if not the recipe's: a YAML or JSON file, a recipe, or a SafeVLM", None
    )
    read: ReadOptions = field(default_factory=ReadOptions)
    overrides: dict = option(
        "training arguments for all stages, e.g. max_steps=100 learning_rate=1e-4",
        {},
        flag="--set",
        parse=parse_overrides,
        nargs="*",
        metavar="NAME=VALUE",
    )

    def __post_init__(self):
        if not 0 <= self.holdout < 1:
            raise ValueError(f"`holdout` must be in [0, 1), got {self.holdout}.")
