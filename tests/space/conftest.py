"""A Space's folder as `safevlm space` assembles it, its modules, and a running Space with known verdicts."""

import importlib
import os
import socket
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import pytest
from tiny import BENIGN, RISKY, picture

from safevlm.trainer.commands.space import assemble

CHROMIUM = "/usr/bin/chromium"


@pytest.fixture(scope="session")
def example(tmp_path_factory):
    path = tmp_path_factory.mktemp("example") / "example.png"
    picture().resize((256, 192)).save(path)
    return path


@pytest.fixture(scope="session")
def space_folder(tmp_path_factory, example):
    folder = tmp_path_factory.mktemp("space")
    assemble(folder, [(str(example), BENIGN), (str(example), RISKY)])
    return folder


@pytest.fixture(scope="session")
def modules(space_folder):
    """The Space's modules that do not need gradio, imported as `app.py` imports them."""
    sys.path.insert(0, str(space_folder))
    names = ("settings", "limits", "verdict_html", "chat_html", "chat_model")
    yield SimpleNamespace(**{name: importlib.import_module(name) for name in names})
    sys.path.remove(str(space_folder))
    for name in (*names, "gate", "handlers", "layout", "app"):
        sys.modules.pop(name, None)


@pytest.fixture(scope="session")
def saved_model(model_folders):
    return model_folders / "judging"


@pytest.fixture(scope="session")
def page(saved_model, space_folder, tmp_path_factory):
    """A running Space: `url`, its `log` file and its folder of `uploads`."""
    if find_spec("gradio") is None:
        pytest.skip("gradio is not installed; pip install 'safevlm[space]'")
    folder = tmp_path_factory.mktemp("running")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith("SAFEVLM_")},
        "SAFEVLM_MODEL": str(saved_model),
        "SAFEVLM_MAX_NEW_TOKENS": "64",
        "SAFEVLM_MAX_FILE_MB": "2",
        "SAFEVLM_MAX_QUESTION_CHARS": "300",
        "SAFEVLM_MAX_AUDIT_IMAGES": "4",
        "SAFEVLM_REQUESTS_PER_MINUTE": "1000",
        "HF_MODULES_CACHE": str(folder / "modules"),
        "HF_HUB_OFFLINE": "1",
        "GRADIO_ANALYTICS_ENABLED": "False",
        "GRADIO_SERVER_PORT": str(port),
        "GRADIO_TEMP_DIR": str(folder / "uploads"),
        "OMP_NUM_THREADS": "1",
    }
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(
            [sys.executable, "app.py"], cwd=space_folder, env=environment, stdout=log, stderr=subprocess.STDOUT
        )
        try:
            deadline = time.monotonic() + 120
            while "Running on local URL" not in (folder / "log").read_text():
                if process.poll() is not None or time.monotonic() > deadline:
                    pytest.fail(f"The Space did not start:\n{(folder / 'log').read_text()[-4000:]}")
                time.sleep(0.25)
            yield SimpleNamespace(url=f"http://127.0.0.1:{port}", log=folder / "log", uploads=folder / "uploads")
        finally:
            process.terminate()
            process.wait(timeout=30)


@pytest.fixture(scope="session")
def browser():
    """Debian's Chromium, headless."""
    if not Path(CHROMIUM).exists():
        pytest.skip(f"no browser at {CHROMIUM}; apt-get install chromium")
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed; pip install playwright")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()
