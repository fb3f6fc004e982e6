"""Options of `safevlm serve`: its flags. The limits among them are in `limits.py`. Imports nothing heavy."""

from dataclasses import dataclass, field

from safevlm.trainer.options import option

from .limits import ServerLimits


@dataclass(frozen=True, kw_only=True)
class ServeOptions:
    """How to serve a model. The help texts of `safevlm serve --help` explain the fields."""

    policy: str | None = option("default, paper, strict, off, or a policy file (default: the model's own)", None)
    host: str = option("address to listen on", "127.0.0.1")
    port: int = option("port to listen on", 8000)
    device: str = option("auto, cpu, cuda, ...", "auto")
    dtype: str = option("float32, bfloat16, ..., or auto for the dtype it was saved in", "auto")
    quantization: str | None = option("load the weights in 4 or 8 bit", None, choices=("bnb-4bit", "bnb-8bit"))
    limits: ServerLimits = field(default_factory=ServerLimits)

    def __post_init__(self):
        if not 0 <= self.port < 2**16:
            raise ValueError(f"--port must be a number from 0 to 65535, got {self.port}.")
