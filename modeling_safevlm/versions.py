"""Which versions go together, checked first of all: others fail here, with what to install, not in the depths.

Every load of a model starts with configuration_safevlm.py, whose first import is this file. It may use only what the
oldest releases of transformers and torch have. (processing_safevlm.py checks for itself: it lies in another package.)
"""

import re

import torch
import transformers

SAFEVLM_VERSION = "0.1.0"
# As in pyproject.toml. Before 5.23, transformers answers silently wrong from pictures with chunked prefill, and from
# caches that Qwen2.5-VL goes on from.
REQUIRED = {transformers: "5.23", torch: "2.6"}
# 5.24 renames `past_key_values` to `cache`, in calls and outputs: caches would pass by the check of what is in them.
BELOW = {transformers: "5.24"}


def release(version: str) -> tuple[int, int]:
    """Major and minor number: `(5, 23)` of `"5.23.1.dev0"`."""
    if (numbers := re.match(r"(\d+)\.(\d+)", str(version))) is None:
        raise ValueError(f"A version must start with two numbers, as {SAFEVLM_VERSION!r} does, got {version!r}.")
    return int(numbers[1]), int(numbers[2])


def check_installed():
    """Raises `ImportError` where an installed package is older or newer than this code can work with."""
    for package, required in REQUIRED.items():
        name, found, below = package.__name__, release(package.__version__), BELOW.get(package)
        if found < release(required) or (below is not None and found >= release(below)):
            needed = f">={required}" if below is None else f">={required},<{below}"
            raise ImportError(
                f"This SafeVLM needs {name} {needed}, found {package.__version__}: "
                f"pip install --upgrade '{name}{needed}' (and restart Python)."
            )


def check_saved_by(version: str | None):
    """
    Raises `ValueError` for a configuration that a later release of safevlm wrote: this one would pass over settings
    that it does not know, and the model might judge otherwise than it was tested to.
    """
    if version is not None and release(version) > release(SAFEVLM_VERSION):
        raise ValueError(
            f"This SafeVLM was saved by safevlm {version}, found {SAFEVLM_VERSION}: "
            f"pip install --upgrade 'safevlm>={version}' (and restart Python)."
        )


check_installed()
