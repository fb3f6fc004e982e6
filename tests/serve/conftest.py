"""A saved model whose verdicts are known, servers of it as processes, and questions about its picture."""

import base64
import io
import os
import socket
import subprocess
import time
import urllib.error
import urllib.request
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
from tiny import answers, encode, judging_model, picture

PACKAGES = ("fastapi", "uvicorn", "openai")


@pytest.fixture(scope="session")
def judge(model, processor, tmp_path_factory):
    """`model` and its `folder`; `refusal`, its text; `answer(question)`, what it says about the picture."""
    for package in PACKAGES:
        pytest.importorskip(package, reason=f"{package} is not installed; pip install 'safevlm[serve]'")
    safe, folder = judging_model(model, processor), tmp_path_factory.mktemp("saved") / "model"
    safe.save_pretrained(folder)
    processor.save_pretrained(folder)

    def answer(question: str) -> str:
        inputs = encode(processor, [question], [1])
        return answers(processor, safe.generate(**inputs, do_sample=False, max_new_tokens=12), inputs)[0]

    refusal = safe.resolve_policy().refusal("politics")
    return SimpleNamespace(model=safe, folder=folder, refusal=refusal, answer=answer)


@pytest.fixture(scope="session")
def serving(tmp_path_factory):
    """`with serving(command) as server:` runs a command until its `address` answers; `log` is what it prints."""

    @contextmanager
    def run(command: list[str]):
        folder = tmp_path_factory.mktemp("serving")
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        server = SimpleNamespace(address=f"http://127.0.0.1:{port}", log=folder / "log")
        environment = {**os.environ, "HF_MODULES_CACHE": str(folder / "modules"), "HF_HUB_OFFLINE": "1"}
        command = [*command, "--device", "cpu", "--host", "127.0.0.1", "--port", str(port)]
        with server.log.open("w") as log:
            process = subprocess.Popen(command, cwd=folder, env=environment, stdout=log, stderr=subprocess.STDOUT)
        try:
            deadline = time.monotonic() + 120
            while not _answers(server.address + "/health"):
                if process.poll() is not None or time.monotonic() > deadline:
                    pytest.fail(f"The server did not start:\n{server.log.read_text()[-4000:]}")
                time.sleep(0.25)
            yield server
        finally:
            process.terminate()
            process.wait(timeout=30)

    return run


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5):
            return True
    except (urllib.error.URLError, ConnectionError):
        return False


@pytest.fixture(scope="session")
def image_url():
    """The picture that the questions are about, as a data URL."""
    png = io.BytesIO()
    picture().save(png, "PNG")
    return "data:image/png;base64," + base64.b64encode(png.getvalue()).decode()


@pytest.fixture(scope="session")
def chat(image_url):
    """`chat(question)`: the messages of a request; `image` is another image's URL, or `None` for none."""

    def messages(question: str, image: str | None = image_url) -> list[dict]:
        images = [] if image is None else [{"type": "image_url", "image_url": {"url": image}}]
        return [{"role": "user", "content": [*images, {"type": "text", "text": question}]}]

    return messages
