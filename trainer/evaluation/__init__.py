"""Evaluation: metrics of the safety head, and where they were measured."""

from .environment import environment
from .metrics import head_metrics, trainer_metrics

__all__ = ["environment", "head_metrics", "trainer_metrics"]
