"""Options of every command that asks a saved model. Imports nothing heavy."""

from dataclasses import dataclass

from .options import option


@dataclass(frozen=True)
class ModelOptions:
    """Which saved model to ask, and how."""

    model: str = option("folder or Hub id of a SafeVLM")
    policy: str | None = option("default, paper, strict, off, or a policy file (default: the model's own)", None)
    device: str | None = option("cpu, cuda, ... (default: cuda if there is one)", None)
