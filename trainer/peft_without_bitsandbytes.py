"""peft without bitsandbytes.

peft imports bitsandbytes wherever it is installed: as transformers' Trainer imports peft, and as LoRA is put on layers
of whatever kind. That takes a second, and on some CPUs a warning on stderr, in trainings that quantise nothing.
"""

import importlib.machinery
import sys
from contextlib import contextmanager


@contextmanager
def without_bitsandbytes():
    """Meanwhile peft takes bitsandbytes for not installed, unless something has imported it."""
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
    """What peft has found out about bitsandbytes."""
    if known := sys.modules.get("peft.import_utils"):
        known.is_bnb_available.cache_clear()
        known.is_bnb_4bit_available.cache_clear()


class PeftFinder:
    """Has peft imported like that, whoever does it first."""

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
