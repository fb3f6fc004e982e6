"""The processor: text and images to model inputs, with placeholders for the safety embeddings."""

from .processing_safevlm import SafeVlmProcessor

__all__ = ["SafeVlmProcessor"]
