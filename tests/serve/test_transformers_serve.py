"""`transformers serve` with a saved SafeVLM: OpenAI-style requests over loopback, answered under the policy.

The server is a process of its own that does not import safevlm: it runs the code saved with the model.
"""

import base64
import io
import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request

import pytest
from tiny import BENIGN, RISKY, answers, encode, judging_model, picture

for package in ("fastapi", "uvicorn", "openai"):
    pytest.importorskip(package, reason=f"{package} is not installed; pip install 'safevlm[serve]'")

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def safe(model, processor):
    return judging_model(model, processor)


@pytest.fixture(scope="module")
def server(safe, processor, tmp_path_factory):
    """The address of a server, and the name its model goes by."""
    folder = tmp_path_factory.mktemp("serve")
    safe.save_pretrained(folder / "model")
    processor.save_pretrained(folder / "model")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "transformers.cli.transformers", "serve", str(folder / "model")]
    command += ["--trust-remote-code", "--device", "cpu", "--host", "127.0.0.1", "--port", str(port)]
    environment = {**os.environ, "HF_MODULES_CACHE": str(folder / "modules"), "HF_HUB_OFFLINE": "1"}
    with (folder / "log").open("w+") as log:
        process = subprocess.Popen(command, cwd=folder, env=environment, stdout=log, stderr=subprocess.STDOUT)
        try:
            deadline = time.monotonic() + 120
            while not _answers(f"http://127.0.0.1:{port}/health"):
                if process.poll() is not None or time.monotonic() > deadline:
                    pytest.fail(f"The server did not start:\n{(folder / 'log').read_text()[-4000:]}")
                time.sleep(0.25)
            yield f"http://127.0.0.1:{port}", str(folder / "model")
        finally:
            process.terminate()
            process.wait(timeout=30)


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5):
            return True
    except (urllib.error.URLError, ConnectionError):
        return False


def request(server, question: str, path: str = "/v1/chat/completions", **fields) -> str:
    """The body of the reply to a question about the picture, which travels as a data URL."""
    address, model = server
    png = io.BytesIO()
    picture().save(png, "PNG")
    url = "data:image/png;base64," + base64.b64encode(png.getvalue()).decode()
    content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": question}]
    body = {"model": model, "messages": [{"role": "user", "content": content}], "temperature": 0, **fields}
    call = urllib.request.Request(
        address + path, json.dumps(body).encode(), {"Content-Type": "application/json"}, method="POST"
    )
    with urllib.request.urlopen(call, timeout=120) as reply:
        return reply.read().decode()


def answer(server, question: str, **fields) -> str:
    return json.loads(request(server, question, **fields))["choices"][0]["message"]["content"]


def streamed(server, question: str, **fields) -> str:
    lines = request(server, question, stream=True, **fields).splitlines()
    chunks = [json.loads(line.removeprefix("data: ")) for line in lines if line.startswith("data: {")]
    assert not [chunk for chunk in chunks if "error" in chunk]
    return "".join(choice["delta"].get("content") or "" for chunk in chunks for choice in chunk["choices"])


def expected(safe, processor, question: str, **kwargs) -> str:
    inputs = encode(processor, [question], [1])
    return answers(processor, safe.generate(**inputs, do_sample=False, max_new_tokens=12, **kwargs), inputs)[0]


def refusal(safe) -> str:
    return safe.resolve_policy().refusal("politics")


def test_a_risky_request_gets_the_refusal(server, safe):
    reply = json.loads(request(server, RISKY))
    assert reply["choices"][0]["message"]["content"].strip() == refusal(safe)
    assert reply["choices"][0]["finish_reason"] == "stop"


def test_a_risky_request_gets_the_refusal_when_streamed(server, safe):
    assert streamed(server, RISKY).strip() == refusal(safe)


def test_a_benign_request_gets_the_models_answer(server, safe, processor):
    wanted = expected(safe, processor, BENIGN)
    assert wanted and wanted != refusal(safe)
    assert answer(server, BENIGN, max_tokens=12) == streamed(server, BENIGN, max_tokens=12) == wanted


@pytest.mark.parametrize(
    "fields",
    [
        {"generation_config": json.dumps({"safety_policy": "off", "max_new_tokens": 64, "eos_token_id": 2})},
        {"chat_template_kwargs": {"safety_policy": "off"}},
        {"temperature": 2.0, "top_p": 0.5, "seed": 1, "frequency_penalty": 2.0},
    ],
    ids=["generation_config", "chat_template_kwargs", "sampling"],
)
def test_no_field_of_a_request_switches_the_policy_off(server, safe, fields):
    assert answer(server, RISKY, **fields).strip() == refusal(safe)


def test_a_bias_on_the_refusals_tokens_does_not_change_it(server, safe, processor):
    ids = {int(i) for i in safe.config.policy_token_ids[refusal(safe)].split()}
    assert answer(server, RISKY, logit_bias={str(i): -100.0 for i in ids}).strip() == refusal(safe)


def test_the_responses_endpoint_enforces_the_policy_too(server, safe):
    address, model = server
    png = io.BytesIO()
    picture().save(png, "PNG")
    url = "data:image/png;base64," + base64.b64encode(png.getvalue()).decode()
    content = [{"type": "input_image", "image_url": url}, {"type": "input_text", "text": RISKY}]
    body = {"model": model, "input": [{"role": "user", "content": content}], "stream": False}
    call = urllib.request.Request(
        address + "/v1/responses", json.dumps(body).encode(), {"Content-Type": "application/json"}, method="POST"
    )
    with urllib.request.urlopen(call, timeout=120) as reply:
        output = json.loads(reply.read())["output"]
    assert output[0]["content"][0]["text"].strip() == refusal(safe)


def test_a_pinned_server_serves_no_other_model(server):
    with pytest.raises(urllib.error.HTTPError, match="400"):
        request(server, RISKY, model="some/unsafe-base")
