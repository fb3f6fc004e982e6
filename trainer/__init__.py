"""Training: the two-stage schedule, its trainer, data and evaluation. Nothing is imported before it is asked for."""

from importlib import import_module
from typing import TYPE_CHECKING

from . import peft_alone

if TYPE_CHECKING:
    from .data_collator import SafeVlmDataCollator
    from .stages import Recipe, run_schedule
    from .trainer import SafeVlmTrainer
    from .training_args import SafeVlmTrainingArguments

_MODULES = {
    "Recipe": "stages",
    "SafeVlmDataCollator": "data_collator",
    "SafeVlmTrainer": "trainer",
    "SafeVlmTrainingArguments": "training_args",
    "run_schedule": "stages",
}

__all__ = ["Recipe", "SafeVlmDataCollator", "SafeVlmTrainer", "SafeVlmTrainingArguments", "run_schedule"]

peft_alone.install()


def __getattr__(name: str):
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_MODULES[name]}", __name__), name)
