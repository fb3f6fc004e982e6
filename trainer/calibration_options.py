"""Options of `safevlm calibrate`: its flags and what [`calibrate_from_files`] takes. Imports nothing heavy."""

import os
from dataclasses import dataclass, field
from pathlib import Path

from .data.read_options import ReadOptions, images_option
from .model_options import ModelOptions
from .options import option


@dataclass(frozen=True, kw_only=True)
class CalibrateOptions(ModelOptions):
    """What to calibrate, on what, and how. The help texts of `safevlm calibrate --help` explain the fields."""

    data: list[str | os.PathLike] = option("labelled rows not trained on: files, folders, zips or Hub ids")
    images: str | os.PathLike | None = images_option()
    read: ReadOptions = field(default_factory=ReadOptions)
    target_fpr: float | None = option("largest share of clean rows to flag, such as 0.05", None)
    cost_ratio: float | None = option("cost of missing a risky row, in flagged clean rows, such as 5", None)
    output: Path = option(
        "folder for policy.yaml, calibration.json, plots and predictions.jsonl, from which a run resumes"
    )
    apply: bool = option("also make it the policy of the model in MODEL", False)
    batch_size: int = option("rows assessed at once", 16)
    seed: int = option("decides which half of the images is fitted on", 0)
