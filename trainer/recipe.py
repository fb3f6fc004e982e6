"""The two-stage schedule as data: a recipe lists stages, a stage is a set of training arguments.

The shipped recipes are in `recipes/`; learning rates and everything else that a stage sets are there.
"""

import os
from dataclasses import dataclass, field, replace
from pathlib import Path

import yaml

from safevlm.from_base import SAFETY_FIELDS

from .settings import RECIPES, load_settings
from .stage.training_args import STAGES, SafeVlmTrainingArguments

NUMBERS = (int, float, int | None, float | None)


@dataclass(frozen=True)
class StageFolder:
    """
    Where a run keeps one of its stages: `OUTPUT/2-joint_finetuning/`.

    Args:
        output_dir (`Path`): The run's.
        number (`int`): Of the stage, from 1.
        stage (`str`): `"safety_alignment"` or `"joint_finetuning"`.
    """

    output_dir: Path
    number: int
    stage: str

    @property
    def name(self) -> str:
        return f"{self.number}-{self.stage}"

    @property
    def path(self) -> Path:
        """Holds `settings.json`, `measured.json` and, during training, `checkpoint-N/`."""
        return self.output_dir / self.name

    @property
    def model(self) -> Path:
        """The trained model. It exists, complete, once the stage is done."""
        return self.path / "model"

    @classmethod
    def find(cls, output_dir: str | os.PathLike) -> "list[StageFolder]":
        """The stages that a run left in `output_dir`, in order."""
        names = [path.name.split("-", 1) for stage in STAGES for path in Path(output_dir).glob(f"[0-9]*-{stage}")]
        folders = [cls(Path(output_dir), int(number), stage) for number, stage in names]
        return sorted(folders, key=lambda folder: folder.number)


@dataclass(frozen=True)
class Recipe:
    """
    Args:
        stages (`list[dict]`): Fields of [`SafeVlmTrainingArguments`] for each stage; `stage` is required.
        safety (`dict`): Fields of [`SafeVlmConfig`] for a base that has no safety modules yet.
    """

    stages: list[dict]
    safety: dict = field(default_factory=dict)

    @classmethod
    def load(cls, name: str | os.PathLike) -> "Recipe":
        """
        A shipped recipe by name, or one from a YAML file.

        Raises:
            `ValueError`: There is no such recipe, or its content is invalid.
        """
        path = Path(name) if str(name).endswith((".yaml", ".yml")) else RECIPES / f"{name}.yaml"
        if not path.is_file():
            shipped = ", ".join(sorted(p.stem for p in RECIPES.glob("*.yaml")))
            raise ValueError(f"Recipe {str(name)!r} not found; use a .yaml file or one of: {shipped}.")
        try:
            content = load_settings(path.read_text(encoding="utf-8"))
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise ValueError(f"Recipe {path} is not valid YAML: {error}") from None
        _check_recipe(content, f"Recipe {path}")
        return cls(stages=content["stages"], safety=content.get("safety") or {})

    def with_arguments(self, **arguments) -> "Recipe":
        """
        The recipe with these training arguments in all its stages.

        Raises:
            `ValueError`: An argument is unknown, has a value of the wrong type, or cannot be the same for all stages.
        """
        if fixed := sorted({"stage", "output_dir"} & set(arguments)):
            raise ValueError(f"`{fixed[0]}` cannot be the same for all stages; it comes from the recipe and the call.")
        check_training_arguments(arguments, "Arguments for all stages")
        return replace(self, stages=[{**stage, **arguments} for stage in self.stages])

    def folders(self, output_dir: str | os.PathLike) -> list[StageFolder]:
        """Where a run in `output_dir` keeps its stages, in order."""
        return [
            StageFolder(Path(output_dir), number, stage["stage"]) for number, stage in enumerate(self.stages, start=1)
        ]


def _check_recipe(content, where: str):
    """Raises `ValueError` if the content of a recipe file is not a recipe."""
    if not isinstance(content, dict) or not isinstance(content.get("stages"), list) or not content["stages"]:
        raise ValueError(f"{where}: `stages` must be a list with at least one stage.")
    if unknown := sorted(set(content) - {"stages", "safety"}):
        raise ValueError(f"{where}: unknown entries {', '.join(unknown)}; use `stages` and `safety`.")
    safety = content.get("safety") or {}
    if not isinstance(safety, dict):
        raise ValueError(f"{where}: `safety` must map fields of SafeVlmConfig to values, got {safety!r}.")
    if unknown := sorted(set(safety) - set(SAFETY_FIELDS)):
        raise ValueError(f"{where}, `safety`: unknown fields {', '.join(unknown)}.")
    for number, stage in enumerate(content["stages"], start=1):
        where_stage = f"{where}, stage {number}"
        if not isinstance(stage, dict) or stage.get("stage") not in STAGES:
            raise ValueError(
                f"{where_stage}: `stage` must be one of {', '.join(STAGES)}, "
                f"got {stage.get('stage') if isinstance(stage, dict) else stage!r}."
            )
        check_training_arguments(stage, where_stage)
        if "output_dir" in stage:
            raise ValueError(f"{where_stage}: leave out `output_dir`; a run sets it for all stages.")


def check_training_arguments(arguments: dict, where: str):
    """Raises `ValueError` if a name is not a training argument, or a value plainly has the wrong type."""
    if unknown := sorted(set(arguments) - set(SafeVlmTrainingArguments.__dataclass_fields__)):
        raise ValueError(f"{where}: unknown training arguments {', '.join(unknown)}.")
    for name, value in arguments.items():
        kind = SafeVlmTrainingArguments.__dataclass_fields__[name].type
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if kind in NUMBERS and value is not None and not number:
            raise ValueError(f"{where}: `{name}` must be a number, got {value!r}.")
        if kind is bool and not isinstance(value, bool):
            raise ValueError(f"{where}: `{name}` must be true or false, got {value!r}.")
