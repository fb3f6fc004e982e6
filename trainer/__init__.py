"""Training: the two-stage schedule, its trainer, data and evaluation."""

from .stages import Recipe, run_schedule
from .trainer import SafeVlmTrainer
from .training_args import SafeVlmTrainingArguments

__all__ = ["Recipe", "SafeVlmTrainer", "SafeVlmTrainingArguments", "run_schedule"]
