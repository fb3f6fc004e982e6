"""Importing peft does not import bitsandbytes.

transformers' Trainer imports peft, and peft imports bitsandbytes wherever it is installed, for a function that is not
used here. That takes a second, and on some CPUs a warning on stderr, in commands that quantise nothing. So peft is
imported as if bitsandbytes was absent; afterwards peft finds it as ever, where a layer is quantised.
"""

import importlib.machinery
import sys


class PeftFinder:
    @staticmethod
    def find_spec(name, path=None, target=None):
        if name != "peft" or "bitsandbytes" in sys.modules:
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path, target)
        if spec is not None:
            spec.loader = PeftLoader(spec.loader.name, spec.loader.path)
        return spec


class PeftLoader(importlib.machinery.SourceFileLoader):
    def exec_module(self, module):
        sys.modules["bitsandbytes"] = None  # an import of it fails
        try:
            super().exec_module(module)
        finally:
            del sys.modules["bitsandbytes"]
        # What peft found out meanwhile is forgotten.
        module.import_utils.is_bnb_available.cache_clear()
        module.import_utils.is_bnb_4bit_available.cache_clear()


def install():
    if "peft" not in sys.modules:
        sys.meta_path.insert(0, PeftFinder)
