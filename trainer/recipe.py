"""The two-stage schedule as data: a recipe lists stages, a stage is a set of training arguments."""

import os
from dataclasses import dataclass, field
from pathlib import Path

import yaml

from safevlm.from_base import SAFETY_FIELDS

from .settings import load_settings
from .stage.training_args import STAGES, SafeVlmTrainingArguments

RECIPES = Path(__file__).parent / "recipes"
NUMBERS = (int, float, int | None, float | None)


@dataclass(frozen=True)
class Recipe:
    """
    Args:
        stages (`list[dict]`): Fields of [`SafeVlmTrainingArguments`] per stage, `stage` among them.
        safety (`dict`): Fields of [`SafeVlmConfig`] for a base that has no safety modules yet.
    """

    stages: list[dict]
    safety: dict = field(default_factory=dict)

    @classmethod
    def load(cls, name: str | os.PathLike) -> "Recipe":
        """A shipped recipe by name, or one from a YAML file."""
        path = Path(name) if str(name).endswith((".yaml", ".yml")) else RECIPES / f"{name}.yaml"
        if not path.is_file():
            shipped = ", ".join(sorted(p.stem for p in RECIPES.glob("*.yaml")))
            raise ValueError(f"Recipe {str(name)!r} not found; use a .yaml file or one of: {shipped}.")
        try:
            data = load_settings(path.read_text(encoding="utf-8"))
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise ValueError(f"Recipe {path} is no valid YAML: {error}") from None
        if not isinstance(data, dict) or not isinstance(data.get("stages"), list) or not data["stages"]:
            raise ValueError(f"Recipe {path}: `stages` must be a list with at least one stage.")
        if unknown := sorted(set(data) - {"stages", "safety"}):
            raise ValueError(f"Recipe {path}: unknown entries {', '.join(unknown)}; use `stages` and `safety`.")
        safety = data.get("safety") or {}
        if not isinstance(safety, dict):
            raise ValueError(f"Recipe {path}: `safety` must map fields of SafeVlmConfig to values, got {safety!r}.")
        if unknown := sorted(set(safety) - set(SAFETY_FIELDS)):
            raise ValueError(f"Recipe {path}, `safety`: unknown fields {', '.join(unknown)}.")
        for number, stage in enumerate(data["stages"], start=1):
            if not isinstance(stage, dict) or stage.get("stage") not in STAGES:
                raise ValueError(
                    f"Recipe {path}, stage {number}: `stage` must be one of {', '.join(STAGES)}, "
                    f"got {stage.get('stage') if isinstance(stage, dict) else stage!r}."
                )
            check_training_arguments(stage, f"Recipe {path}, stage {number}")
            if "output_dir" in stage:
                raise ValueError(
                    f"Recipe {path}, stage {number}: leave out `output_dir`; a run names it for all stages."
                )
        return cls(stages=data["stages"], safety=safety)


def check_training_arguments(arguments: dict, where: str):
    """Raises `ValueError` for a name that is no training argument, and for a value that is plainly of a wrong type."""
    if unknown := sorted(set(arguments) - set(SafeVlmTrainingArguments.__dataclass_fields__)):
        raise ValueError(f"{where}: unknown training arguments {', '.join(unknown)}.")
    for name, value in arguments.items():
        kind = SafeVlmTrainingArguments.__dataclass_fields__[name].type
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if kind in NUMBERS and value is not None and not number:
            raise ValueError(f"{where}: `{name}` must be a number, got {value!r}.")
        if kind is bool and not isinstance(value, bool):
            raise ValueError(f"{where}: `{name}` must be true or false, got {value!r}.")


def check_overrides(overrides: dict):
    """As `check_training_arguments`, for arguments of all stages."""
    if fixed := sorted({"stage", "output_dir"} & set(overrides)):
        raise ValueError(f"`{fixed[0]}` cannot be the same for all stages; it comes from the recipe and the call.")
    check_training_arguments(overrides, "Arguments for all stages")
