"""A loopback Hub in place of the real one, and a saved model to push to it."""

import shutil
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))  # for `loopback`

import pytest
from loopback import taken_for_the_hub

from safevlm.model_card import write_card

FACTS = {"model_name": "Tiny SafeVLM", "base_model": {"name": "me/tiny-llava", "revision": "0" * 40}}


@pytest.fixture
def hub(monkeypatch):
    with taken_for_the_hub(monkeypatch) as running:
        yield running


@pytest.fixture
def waits(monkeypatch):
    """Retries do not wait; this records how long they would have waited, in seconds."""
    noted = []
    monkeypatch.setattr("time.sleep", noted.append)
    return noted


@pytest.fixture(scope="session")
def pushed_model(model, model_folders):
    """The model that `model_folders` saved as `safe`; saving notes its architecture in its configuration."""
    return model


@pytest.fixture(scope="session")
def saved_once(model_folders, tmp_path_factory):
    """`pushed_model` and its processor, with a card."""
    folder = Path(shutil.copytree(model_folders / "safe", tmp_path_factory.mktemp("published") / "model"))
    write_card(folder, FACTS)
    return folder


@pytest.fixture
def saved(saved_once, tmp_path):
    """A copy of the saved model that a test may change."""
    return Path(shutil.copytree(saved_once, tmp_path / "model"))
