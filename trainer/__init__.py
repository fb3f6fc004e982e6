"""Training: the two-stage schedule, its trainer, data and evaluation. Nothing is imported before it is asked for."""

from importlib import import_module
from typing import TYPE_CHECKING

from . import peft_without_bitsandbytes

if TYPE_CHECKING:
    from .encoding.data_collator import SafeVlmDataCollator
    from .recipe import Recipe
    from .schedule import run_schedule
    from .stage.trainer import SafeVlmTrainer
    from .stage.training_args import SafeVlmTrainingArguments

_MODULES = {
    "Recipe": "recipe",
    "SafeVlmDataCollator": "encoding.data_collator",
    "SafeVlmTrainer": "stage.trainer",
    "SafeVlmTrainingArguments": "stage.training_args",
    "run_schedule": "schedule",
}

__all__ = ["Recipe", "SafeVlmDataCollator", "SafeVlmTrainer", "SafeVlmTrainingArguments", "run_schedule"]

peft_without_bitsandbytes.install()


def __getattr__(name: str):
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_MODULES[name]}", __name__), name)
