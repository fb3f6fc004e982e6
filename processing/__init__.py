"""The processor: text and images to model inputs, with placeholders for the safety embeddings."""

__all__ = ["SafeVlmProcessor"]


def __getattr__(name: str):
    # Whoever reads pictures, as `safevlm data` does, needs neither the processor nor torch.
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from .processing_safevlm import SafeVlmProcessor

    return SafeVlmProcessor
