"""Tiny models and processors, built once per session. A test that changes one takes a `copy.deepcopy`."""

import os
import sys
from pathlib import Path

# Before torch starts its threads: spinning OpenMP workers are slow on a shared machine.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.insert(0, str(Path(__file__).parent))  # for `tiny`

import pytest
import torch
from tiny import LEVELS, encode, force_verdicts, safe_model, tiny_llava, tiny_processor

from safevlm import SafeVlmProcessor


@pytest.fixture(scope="session", autouse=True)
def _one_thread():
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def base_processor():
    return tiny_processor()


@pytest.fixture(scope="session")
def processor(base_processor):
    return SafeVlmProcessor.from_base(base_processor)


@pytest.fixture(scope="session")
def base():
    """A base model that nothing has wrapped."""
    return tiny_llava()


@pytest.fixture(scope="session")
def model(processor):
    """Its safety embeddings are large enough to change answers."""
    return safe_model(tiny_llava(), processor)


@pytest.fixture(scope="session")
def batch(processor):
    """Three left-padded rows with 1, 2 and 0 images."""
    return encode(processor, ["What is in the picture?", "Is it yes?", "no"], images=[1, 2, 0])


@pytest.fixture
def verdicts(monkeypatch):
    """`verdicts(model, "high", "none", ...)` makes the safety head say one level per row of the batch."""

    def set_verdicts(model, *levels, category="politics"):
        force_verdicts(monkeypatch, model, [LEVELS.index(level) for level in levels], category)

    return set_verdicts
