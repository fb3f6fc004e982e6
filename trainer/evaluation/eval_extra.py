"""The optional packages of `safevlm[eval]`: an error that says what to install where one is missing."""

from importlib.util import find_spec

_ON_PYPI = {"lmms_eval": "lmms-eval", "sklearn": "scikit-learn"}
"""Names on the package index, where they differ from the module's."""


def require(module: str, purpose: str) -> None:
    """Raises an `ImportError` if `module` is not installed; `purpose`, such as "POPE metrics need", opens its text."""
    if find_spec(module) is None:
        raise ImportError(f"{purpose} {_ON_PYPI.get(module, module)}: pip install 'safevlm[eval]'.")


def require_head_packages() -> None:
    """Raises before anything expensive runs if the safety head can be neither measured nor plotted."""
    require("sklearn", "Measures of the safety head need")
    require("matplotlib", "Plots of the safety head need")
