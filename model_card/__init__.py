"""The model card, and what publishes a model."""

from .card import write_card

__all__ = ["write_card"]
