"""Evaluation: metrics of the safety head."""

from .metrics import head_metrics, trainer_metrics

__all__ = ["head_metrics", "trainer_metrics"]
