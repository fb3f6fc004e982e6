"""The processor: text and images to model inputs, with placeholders for the safety embeddings.

It is imported when it is asked for: pictures are read without transformers, too.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .processing_safevlm import SafeVlmProcessor

__all__ = ["SafeVlmProcessor"]


def __getattr__(name: str):
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from .processing_safevlm import SafeVlmProcessor

    return SafeVlmProcessor
