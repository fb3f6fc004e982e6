"""safevlm: make a vision-language model safe, and measure how safe it is (SafeVLM, arXiv 2405.13581).

Importing this package registers its classes with the Auto classes of transformers. Only in the `safevlm` command are
they imported and registered when one is first used: `safevlm --help` and `safevlm data check` need neither torch nor
transformers.
"""

import signal
import sys
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

__version__ = version("safevlm")

# Whether Python was started as `safevlm ...` or `python -m safevlm ...` (then "-m" while Python looks for the module).
_IS_COMMAND = Path(sys.argv[0]).stem == "safevlm" or (
    sys.argv[0] == "-m" and bool({"safevlm", "safevlm.trainer.cli"} & set(sys.orig_argv))
)

if _IS_COMMAND and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends Python without a traceback until `main` handles it

if TYPE_CHECKING or not _IS_COMMAND:
    from .registration import (
        ACTIONS,
        POLICY_PRESETS,
        SafetyPolicy,
        SafetyVerdict,
        SafeVlmConfig,
        SafeVlmForConditionalGeneration,
        SafeVlmOutput,
        SafeVlmPipeline,
        SafeVlmProcessor,
    )

__all__ = [
    "ACTIONS",
    "POLICY_PRESETS",
    "SafeVlmConfig",
    "SafeVlmForConditionalGeneration",
    "SafeVlmOutput",
    "SafeVlmPipeline",
    "SafeVlmProcessor",
    "SafetyPolicy",
    "SafetyVerdict",
]


def __getattr__(name: str):
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from . import registration

    return getattr(registration, name)
