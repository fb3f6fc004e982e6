"""Tiny models and processors, built once per session. A test that changes one works on a `copy.deepcopy`."""

import gc
import os
import sys
from pathlib import Path

# Before torch starts its threads: spinning OpenMP workers are slow on a shared machine.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.insert(0, str(Path(__file__).parent))  # for `tiny`

import pytest
import torch
from tiny import LEVELS, encode, force_verdicts, judging_model, safe_model, tiny_llava, tiny_processor

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
    """A plain base model, not wrapped in a SafeVLM."""
    return tiny_llava()


@pytest.fixture(scope="session")
def model(processor):
    """A SafeVLM whose safety embeddings are large enough to change answers."""
    return safe_model(tiny_llava(), processor)


@pytest.fixture(scope="session")
def judging(model, processor):
    """A copy of `model` whose verdicts are known (see `judging_model`)."""
    return judging_model(model, processor)


@pytest.fixture(scope="session")
def model_folders(base, base_processor, model, judging, processor, tmp_path_factory):
    """
    A folder with the saved models `base`, `safe` and `judging`, each with its processor, and the `adapter` of `safe`.
    A test that changes one of them makes a copy.
    """
    folder = tmp_path_factory.mktemp("models")
    for name, *parts in (("base", base, base_processor), ("safe", model, processor), ("judging", judging, processor)):
        for part in parts:
            part.save_pretrained(folder / name)
    model.save_safety_adapter(folder / "adapter")
    return folder


@pytest.fixture(scope="session")
def odd_files():
    """The folder of Pillow's odd images (see `odd_pictures.py`) in the test data."""
    root = Path(__file__).parents[1] / os.environ.get("SAFEVLM_TEST_DATA", "../shared/data")
    if not root.is_dir():
        pytest.skip(f"no test data at {root}; set SAFEVLM_TEST_DATA")
    return root.resolve() / "pillow_odd_images/Tests/images"


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


def pytest_addoption(parser):
    parser.addoption("--family-table", help="file whose table of families this run writes (see test_families.py)")


def pytest_configure(config):
    config.addinivalue_line("markers", "column(name): the test's column in the table of families")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    report = yield
    if (column := item.get_closest_marker("column")) is not None:
        report.user_properties.append(("column", (item.callspec.params["family"], column.args[0])))
    return report


def pytest_terminal_summary(terminalreporter, config):
    path = config.getoption("--family-table")
    if path is None:
        return
    from families import write_table

    results = {}
    for outcome in ("passed", "failed", "skipped", "error"):
        for report in terminalreporter.stats.get(outcome, []):
            for name, cell in report.user_properties:
                if name == "column":
                    results.setdefault(tuple(cell), []).append(outcome)
    write_table(Path(path), results)
    terminalreporter.write_line(f"Wrote the table of families into {path}.")


@pytest.fixture
def uncollected():
    """For input so deep that it ends in a `RecursionError`: what other tests left behind is not finalised in there."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()
