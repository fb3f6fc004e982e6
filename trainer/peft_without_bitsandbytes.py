"""peft without bitsandbytes.

peft imports bitsandbytes if it is installed: when transformers' Trainer imports peft, and when LoRA is added to layers
of any kind. That takes a second, and on some CPUs prints a warning, even if nothing is quantised.
"""

import importlib.machinery
import sys
from contextlib import contextmanager


@contextmanager
def without_bitsandbytes():
    """Within the block, peft takes bitsandbytes for not installed, unless it has been imported already."""
    if "bitsandbytes" in sys.modules:
        yield
        return
    _forget()
    sys.modules["bitsandbytes"] = None  # an import of it fails
    try:
        yield
    finally:
        del sys.modules["bitsandbytes"]
        _forget()


def _forget():
    """Clears what peft remembers about bitsandbytes."""
    if known := sys.modules.get("peft.import_utils"):
        known.is_bnb_available.cache_clear()
        known.is_bnb_4bit_available.cache_clear()


class PeftFinder:
    """Makes the first import of peft, wherever it is, happen without bitsandbytes."""

    @staticmethod
    def find_spec(name, path=None, target=None):
        if name != "peft":
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path, target)
        if spec is not None:
            spec.loader = PeftLoader(spec.loader.name, spec.loader.path)
        return spec


class PeftLoader(importlib.machinery.SourceFileLoader):
    def exec_module(self, module):
        with without_bitsandbytes():
            super().exec_module(module)


def install():
    if "peft" not in sys.modules:
        sys.meta_path.insert(0, PeftFinder)
