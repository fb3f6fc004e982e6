"""The model card, and publishing a model. Nothing is imported before it is used."""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .card import refresh_card, write_card
    from .push import push_to_hub

_MODULES = {"push_to_hub": "push", "refresh_card": "card", "write_card": "card"}

__all__ = ["push_to_hub", "refresh_card", "write_card"]


def __getattr__(name: str):
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_MODULES[name]}", __name__), name)
