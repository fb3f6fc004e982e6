"""A saved model with known verdicts, servers that run it, and requests with a picture."""

import base64
import io
import json
import os
import socket
import subprocess
import threading
import time
import urllib.error
import urllib.request
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
from http_client import GENERATED, error_of, post
from tiny import RISKY, answers, encode, picture

PACKAGES = ("fastapi", "uvicorn", "openai")


@pytest.fixture(scope="session")
def judge(judging, model_folders, processor):
    """The `model` and its `folder`; the text of its `refusal`; `answer(question)`, its answer about the picture."""
    for package in PACKAGES:
        pytest.importorskip(package, reason=f"{package} is not installed; pip install 'safevlm[serve]'")

    def answer(question: str) -> str:
        inputs = encode(processor, [question], [1])
        return answers(processor, judging.generate(**inputs, do_sample=False, max_new_tokens=12), inputs)[0]

    refusal = judging.resolve_policy().refusal("politics")
    return SimpleNamespace(model=judging, folder=model_folders / "judging", refusal=refusal, answer=answer)


@pytest.fixture(scope="session")
def serving(tmp_path_factory):
    """`with serving(command) as server:` starts a server and waits until its `address` answers; `log` is a file."""

    @contextmanager
    def run(command: list[str], ends_within: float = 30):
        folder = tmp_path_factory.mktemp("serving")
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        server = SimpleNamespace(address=f"http://127.0.0.1:{port}", log=folder / "log")
        environment = {**os.environ, "HF_MODULES_CACHE": str(folder / "modules"), "HF_HUB_OFFLINE": "1"}
        command = [*command, "--device", "cpu", "--host", "127.0.0.1", "--port", str(port)]
        with server.log.open("w") as log:
            process = subprocess.Popen(command, cwd=folder, env=environment, stdout=log, stderr=subprocess.STDOUT)
        server.process = process
        try:
            deadline = time.monotonic() + 120
            while not _answers(server.address + "/health"):
                if process.poll() is not None or time.monotonic() > deadline:
                    pytest.fail(f"The server did not start:\n{server.log.read_text()[-4000:]}")
                time.sleep(0.25)
            yield server
        finally:
            process.terminate()
            process.wait(timeout=ends_within)

    return run


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5):
            return True
    except (urllib.error.URLError, ConnectionError):
        return False


@pytest.fixture(scope="session")
def image_url():
    """The picture of the questions, as a data URL."""
    png = io.BytesIO()
    picture().save(png, "PNG")
    return "data:image/png;base64," + base64.b64encode(png.getvalue()).decode()


@pytest.fixture(scope="session")
def chat(image_url):
    """`chat(question)`: the messages of a request. `image` is the URL of another image, or `None` for no image."""

    def messages(question: str, image: str | None = image_url) -> list[dict]:
        images = [] if image is None else [{"type": "image_url", "image_url": {"url": image}}]
        return [{"role": "user", "content": [*images, {"type": "text", "text": question}]}]

    return messages


@pytest.fixture(scope="session")
def in_thread():
    """`with in_thread(model, processor) as server:` runs the server of `safevlm serve` in this process."""
    from safevlm.trainer.serving.answering import Answering
    from safevlm.trainer.serving.limits import ServerLimits
    from safevlm.trainer.serving.routes import build_app
    from safevlm.trainer.serving.server import Server

    @contextmanager
    def run(model, processor, name="demo/model", endless=False, seconds=120.0, max_waiting=16, max_request_mb=2):
        answering = Answering(model, processor, max_pixels=25_000_000)
        if endless:
            answering.max_tokens = 10**9
        limits = ServerLimits(max_request_mb, request_timeout=seconds, max_waiting=max_waiting)
        app = build_app(answering, name, limits)
        server = Server(app, "127.0.0.1", 0, seconds, "")
        thread = threading.Thread(target=server.run, daemon=True)
        thread.start()
        while not server.started:
            assert thread.is_alive()
            time.sleep(0.01)
        port = server.servers[0].sockets[0].getsockname()[1]
        try:
            yield SimpleNamespace(address=f"http://127.0.0.1:{port}", port=port, answering=answering, app=app)
        finally:
            server.should_exit = True
            thread.join(timeout=10)
            assert not thread.is_alive()

    return run


@pytest.fixture(scope="module")
def server(judge, processor, in_thread):
    with in_thread(judge.model, processor, str(judge.folder)) as server:
        yield server


@pytest.fixture(scope="module")
def client(server):
    import openai

    return openai.OpenAI(base_url=f"{server.address}/v1", api_key="none", max_retries=0)


@pytest.fixture(scope="module")
def ask(client, judge):
    """`ask(messages)`: the reply, as the openai package returns it."""

    def create(messages, **fields):
        return client.chat.completions.create(model=str(judge.folder), messages=messages, **{**GENERATED, **fields})

    return create


@pytest.fixture(scope="module")
def refused(server, judge, ask, chat):
    """`refused(messages)`: status and error of a request that must fail. Checks that the server keeps working."""

    def send(messages=None, body=None, **fields):
        request = {"model": str(judge.folder), "messages": messages, **GENERATED, **fields}
        status, reply = post(server, body=json.dumps(request).encode() if body is None else body)
        assert ask(chat(RISKY)).safety["action"] == "refuse"
        return status, error_of(reply)

    return send
