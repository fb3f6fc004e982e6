"""`import safevlm` is cheap and registers everything."""

import json
import subprocess
import sys

import pytest

HEAVY = ["datasets", "peft", "gradio", "sklearn", "matplotlib", "bitsandbytes", "pandas", "safevlm.trainer"]


@pytest.fixture(scope="module")
def loaded():
    """Names of the modules that a bare import loads."""
    code = "import json, sys, safevlm; print(json.dumps(list(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(json.loads(done.stdout.splitlines()[-1]))


@pytest.mark.parametrize("name", HEAVY)
def test_import_loads_no(loaded, name):
    assert name not in loaded


def test_import_registers_the_classes_with_the_auto_classes():
    from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText

    import safevlm

    assert type(AutoConfig.for_model("safevlm")) is safevlm.SafeVlmConfig
    for auto in (AutoModel, AutoModelForImageTextToText):
        assert auto._model_mapping[safevlm.SafeVlmConfig] is safevlm.SafeVlmForConditionalGeneration


def test_everything_public_is_there():
    import safevlm

    assert safevlm.__all__ == sorted(safevlm.__all__)
    assert all(hasattr(safevlm, name) for name in safevlm.__all__)
