"""The folders that documents run in: a finished demo, real data, and a stand-in for the Hub as the only network."""

import os
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "hub"))  # for `loopback`
sys.path.insert(0, str(Path(__file__).parent))  # for `blocks`

import pytest
from blocks import ROOT
from filelock import FileLock
from loopback import LoopbackHub
from workplace import Workplace

HERE = Path(__file__).parent
DATA = ROOT / os.environ.get("SAFEVLM_TEST_DATA", "../shared/data")


@pytest.fixture(scope="session")
def workplace(tmp_path_factory):
    """One per test worker: a home, a Hub, commands, and a process that has imported torch."""
    if not DATA.is_dir():
        pytest.skip(f"no test data at {DATA}; set SAFEVLM_TEST_DATA")
    for package in ("lmms_eval", "peft", "sklearn", "matplotlib", "imagehash", "openai", "fastapi", "uvicorn"):
        pytest.importorskip(
            package, reason=f"the documents' commands need {package}: pip install '.[train,data,eval,serve]'"
        )
    folder = tmp_path_factory.mktemp("docs")
    shutil.copytree(DATA, folder / "shared" / "data")
    with LoopbackHub() as hub:
        place = Workplace(folder, hub)
        server = subprocess.Popen(
            [sys.executable, HERE / "preloaded.py", "serve", place.socket],
            env=place.environment,
            stdout=subprocess.DEVNULL,
        )
        try:
            while not place.socket_answers():
                assert server.poll() is None, "preloaded.py ended"
                time.sleep(0.1)
            yield place
        finally:
            server.terminate()
            server.wait(timeout=30)


@pytest.fixture(scope="session")
def demo(workplace, tmp_path_factory):
    """
    The folder that the tutorial's first command writes, made once for all test workers.

    With `SAFEVLM_DOCS_DEMO=FOLDER` the output of an earlier `safevlm demo` is used instead. If that was a full one,
    the outputs of a full demo that the documents show are compared, too.
    """
    if "SAFEVLM_DOCS_DEMO" in os.environ:
        return Path(os.environ["SAFEVLM_DOCS_DEMO"]).resolve()
    shared = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        shared = shared.parent
    with FileLock(shared / "docs-demo.lock"):
        if not (shared / "docs-demo" / "results.json").is_file():
            (shared / "docs-demo").mkdir(exist_ok=True)
            with open(shared / "docs-demo.log", "w") as log:
                code = workplace.call(
                    ["safevlm", "demo", "--fast", "--output", str(shared / "docs-demo")], shared, log
                )
            assert code == 0, (shared / "docs-demo.log").read_text()[-4000:]
    return shared / "docs-demo"


@pytest.fixture
def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]
