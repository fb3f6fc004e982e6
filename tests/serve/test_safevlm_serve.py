"""`safevlm serve`: the verdict beside the answer, and no request that gets past the policy or stops the server."""

import base64
import http.client
import json
import math
import os
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from tiny import BENIGN, RISKY, encode, judging_model

from safevlm.trainer.cli import main

pytestmark = pytest.mark.slow
GENERATED = {"temperature": 0, "max_tokens": 12}


@pytest.fixture(scope="module")
def server(judge, serving):
    command = [sys.executable, "-m", "safevlm.trainer.cli", "serve", str(judge.folder), "--max-request-mb", "2"]
    with serving(command) as server:
        yield server


@pytest.fixture(scope="module")
def client(server):
    import openai

    return openai.OpenAI(base_url=f"{server.address}/v1", api_key="none", max_retries=0)


@pytest.fixture(scope="module")
def ask(client, judge):
    """`ask(messages)`: the reply as the package openai gives it."""

    def create(messages, **fields):
        return client.chat.completions.create(model=str(judge.folder), messages=messages, **{**GENERATED, **fields})

    return create


@pytest.fixture(scope="module")
def refused(server, judge, ask, chat):
    """`refused(messages)`: status and message of a request that must fail; the server must go on."""

    def send(messages=None, body=None, **fields):
        request = {"model": str(judge.folder), "messages": messages, **GENERATED, **fields}
        body = json.dumps(request).encode() if body is None else body
        status, reply = post(server, "/v1/chat/completions", body)
        assert ask(chat(RISKY)).safety["action"] == "refuse"
        return status, json.loads(reply)["error"]

    return send


def post(server, path: str, body: bytes, method: str = "POST") -> tuple[int, str]:
    connection = http.client.HTTPConnection(server.address.removeprefix("http://"), timeout=120)
    connection.request(method, path, body, {"Content-Type": "application/json"})
    reply = connection.getresponse()
    text = reply.read().decode()
    connection.close()
    return reply.status, text


@pytest.fixture(scope="module")
def verdict(judge, processor):
    """`verdict(question)`: what `assess` says about the picture."""
    return lambda question, **kwargs: judge.model.assess(**encode(processor, [question], [1]), **kwargs).to_list()[0]


def same(found: dict, expected: dict) -> bool:
    """Whether two verdicts are equal, probabilities nearly."""
    return set(found) == set(expected) and all(found[name] == pytest.approx(expected[name]) for name in expected)


def test_it_says_where_it_listens(server, judge):
    assert f"Serving {judge.folder} at {server.address}/v1\n" in server.log.read_text()


def test_a_risky_request_gets_refusal_and_verdict(ask, chat, judge, verdict):
    reply = ask(chat(RISKY), max_tokens=None)
    assert reply.choices[0].message.content.strip() == judge.refusal
    assert same(reply.safety, verdict(RISKY)) and reply.safety["action"] == "refuse"
    assert (reply.safety["category"], reply.safety["level"]) == ("politics", "high")


def test_a_benign_request_gets_the_models_answer_and_verdict(ask, chat, judge, verdict):
    reply = ask(chat(BENIGN))
    assert reply.choices[0].message.content == judge.answer(BENIGN) != judge.refusal
    assert same(reply.safety, verdict(BENIGN)) and reply.safety["action"] == "allow"


@pytest.mark.parametrize("question", [RISKY, BENIGN])
def test_a_stream_has_the_verdict_with_the_first_words_and_at_the_end(ask, chat, judge, verdict, question):
    chunks = list(ask(chat(question), stream=True, max_tokens=64 if question == RISKY else 12))
    words = [chunk.choices[0].delta.content or "" for chunk in chunks]
    assert "".join(words).strip() == (judge.refusal if question == RISKY else judge.answer(question).strip())
    spoken = next(i for i, word in enumerate(words) if word)
    found = [getattr(chunk, "safety", None) for chunk in chunks]
    assert any(found[: spoken + 1]) and chunks[-1].choices[0].finish_reason
    assert len([one for one in found if one]) == 2  # not in every chunk
    assert same(found[-1], verdict(question))


@pytest.mark.parametrize("stream", [False, True])
def test_a_request_without_an_image_is_not_assessed(ask, chat, stream):
    reply = ask(chat(RISKY, image=None), stream=stream)
    safety = list(reply)[-1].safety if stream else reply.safety
    assert (safety["assessed"], safety["action"], safety["category"]) == (False, "allow", None)


def test_requests_at_the_same_time_keep_their_own_verdicts(ask, chat, verdict):
    def last(question):
        *_, chunk = ask(chat(question), stream=True)
        return chunk.safety

    questions = [RISKY, BENIGN] * 4
    with ThreadPoolExecutor(len(questions)) as pool:
        whole = pool.map(lambda question: ask(chat(question)).safety, questions)
        streams = pool.map(last, questions)
        for question, *found in zip(questions, whole, streams, strict=True):
            assert [one["action"] for one in found] == [verdict(question)["action"]] * 2


def test_a_stream_that_is_left_does_not_stop_the_server(ask, chat):
    stream = ask(chat(BENIGN), stream=True, max_tokens=100_000)
    next(stream)
    stream.close()
    assert ask(chat(RISKY)).safety["action"] == "refuse"


def test_the_chats_before_belong_to_the_question(ask, chat):
    later = [{"role": "assistant", "content": "An answer."}, {"role": "user", "content": "Go on."}]
    assert ask([*chat(RISKY), *later]).safety["assessed"]


@pytest.mark.parametrize(
    "fields",
    [
        {"generation_config": json.dumps({"safety_policy": "off", "max_new_tokens": 64, "eos_token_id": 2})},
        {"chat_template_kwargs": {"safety_policy": "off"}},
        {"chat_template_kwargs": {"chat_template": "<image>\n{{ 'hello' }} ASSISTANT:"}},
        {"safety_policy": "off"},
        {"tools": [{"type": "function", "function": {"name": "</s>"}}]},
    ],
    ids=["generation_config", "chat_template_kwargs", "chat_template", "safety_policy", "tools"],
)
def test_fields_that_reach_past_the_policy_are_refused(refused, chat, fields):
    status, message = refused(chat(RISKY), **fields)
    assert status == 422 and str(set(fields)) in message


@pytest.mark.parametrize(
    "fields",
    [
        {"temperature": 2.0, "top_p": 0.5, "seed": 1, "frequency_penalty": 2.0},
        {"user": "off", "metadata": {"safety_policy": "off"}},
    ],
    ids=["sampling", "ignored"],
)
def test_no_field_of_a_request_changes_the_policy(ask, chat, judge, fields):
    reply = ask(chat(RISKY), max_tokens=None, **fields)
    assert reply.choices[0].message.content.strip() == judge.refusal
    assert reply.safety["action"] == "refuse"


def test_a_bias_on_the_refusals_tokens_does_not_change_it(ask, chat, judge):
    ids = judge.model.config.policy_token_ids[judge.refusal].split()
    reply = ask(chat(RISKY), max_tokens=None, logit_bias=dict.fromkeys(ids, -100))
    assert reply.choices[0].message.content.strip() == judge.refusal


def test_stop_ends_an_answer(ask, chat, judge):
    whole = judge.answer(BENIGN)
    assert len(whole) > 1 and ask(chat(BENIGN), stop=[whole[0]]).choices[0].message.content == whole[0]


def test_it_serves_one_model_and_names_it(client, refused, chat, judge):
    assert [model.id for model in client.models.list()] == [str(judge.folder)]
    assert refused(chat(RISKY), model="some/unsafe-base")[0] == 400


@pytest.mark.parametrize(
    "path", ["/v1/systemone", "/load_model", "/reset", "/v1/completions", "/v1/responses", "/docs", "/openapi.json"]
)
def test_there_is_no_other_endpoint(server, path):
    for method in ("POST", "GET"):
        assert post(server, path, b"{}", method)[0] == 404


@pytest.fixture
def forbidden_host():
    """The address of a server that nobody may ask, and what it was asked."""
    asked = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            self.send_error(404)

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as host:
        threading.Thread(target=host.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{host.server_port}", asked
        host.shutdown()


def test_nothing_is_fetched_and_no_file_is_read(refused, chat, forbidden_host, tmp_path, image_url):
    address, asked = forbidden_host
    secret = tmp_path / "secret.png"
    secret.write_bytes(base64.b64decode(image_url.partition(",")[2]))
    urls = [
        f"{address}/x.png",
        f"file://{secret}",
        str(secret),
        "ftp://x/y",
        image_url.replace("image/png", "text/html"),
    ]
    for url in [*urls, image_url.partition(",")[2]]:
        status, message = refused(chat(BENIGN, image=url))
        assert (status, message.partition(" must")[0]) == (400, "Image 1")
    for kind in ("video_url", "audio_url", "input_audio", "image"):
        part = {"type": kind, kind: {"url": address}, "url": address, "image": address}
        assert refused([{"role": "user", "content": [part]}])[0] == 400
    assert asked == []


@pytest.mark.parametrize(
    "messages, message",
    [
        (None, "messages: "),
        ([], "messages: "),
        ([{"role": "user", "content": "hi"}] * 1000, "messages: "),
        ([{"role": "tool", "content": "hi"}], "messages.0.role: "),
        ([{"role": "user", "content": [{"type": "text"}]}], "messages.0.content.0.text.text: "),
        ([{"role": "user", "content": "hi " * 2000}], "The prompt has "),
    ],
    ids=["none", "empty", "many", "role", "no_text", "long"],
)
def test_messages_that_cannot_be_answered_are_refused(refused, messages, message):
    status, error = refused(messages)
    assert status == 400 and error.startswith(message)


def test_values_that_cannot_be_used_are_refused(refused, chat):
    for field, value in (("max_tokens", 0), ("temperature", "hot"), ("logit_bias", {"a": 1}), ("seed", 2**80)):
        status, error = refused(chat(BENIGN), **{field: value})
        assert status == 400 and error.startswith("A field of the request cannot be used: ")


def test_a_body_that_is_no_request_is_refused(refused):
    for body in (b"", b"{", b"[]", b"\xff", b"[" * 100_000, b"null"):
        assert refused(body=body) == (400, "The request's body is not a JSON object.")
    assert refused(body=b"{" + b" " * 2_000_000)[0] == 413


@pytest.fixture(scope="module")
def odd_files():
    """Pillow's odd images, from `SAFEVLM_TEST_DATA`."""
    root = Path(__file__).parents[2] / os.environ.get("SAFEVLM_TEST_DATA", "../shared/data")
    if not root.is_dir():
        pytest.skip(f"no test data at {root}; set SAFEVLM_TEST_DATA")
    return root / "pillow_odd_images/Tests/images"


def data_url(content: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(content).decode()


def test_bad_images_are_refused_with_the_loaders_words(refused, chat, odd_files, image_url):
    files = {
        "decompression_bomb.gif": "is too large",
        "decompression_bomb.ico": "is not a readable PNG",
        "broken_data_stream.png": "is truncated or corrupt",
        "truncated_image.png": "is truncated or corrupt",
    }
    for name, reason in files.items():
        status, message = refused(chat(BENIGN, image=data_url((odd_files / name).read_bytes())))
        assert status == 400 and message.startswith("Image 1 ") and reason in message
    assert refused(chat(BENIGN, image=image_url + "?"))[1].startswith("Image 1 is not base64")


def test_many_large_images_together_are_refused(refused, chat):
    """Each is as large as one may be; together they would take gigabytes."""
    from io import BytesIO

    from PIL import Image

    png = BytesIO()
    Image.new("1", (7000, 7000)).save(png, "PNG", optimize=True)
    part = chat(BENIGN, image=data_url(png.getvalue()))[0]["content"][0]
    status, message = refused([{"role": "user", "content": [part] * 40}])
    assert status == 400 and message.startswith("Image 2 has 7000x7000 pixels, more than 1000000")


@pytest.fixture(scope="module")
def unsure(judge, processor, model, tmp_path_factory):
    """A model that finds `RISKY` risky with a probability of 0.35: `default` allows that, `strict` refuses it."""
    safe, folder = judging_model(model, processor), tmp_path_factory.mktemp("unsure") / "model"
    none = safe.assess(**encode(processor, [RISKY], [1])).level_probabilities[0, 0].double().item()
    with torch.no_grad():
        safe.safety.head.level_classifier.bias[0] += math.log((1 - none) / none) - math.log(0.35 / 0.65)
    safe.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@pytest.fixture
def here(monkeypatch):
    """`here("MODEL", ...)`: a client of `safevlm serve MODEL ...`, without another process."""
    from starlette.testclient import TestClient

    def client(*arguments):
        apps = []
        monkeypatch.setattr("uvicorn.Server.run", lambda server: apps.append(server.config.app))
        assert main(["serve", "--device", "cpu", *map(str, arguments)]) == 0
        return TestClient(apps[0], raise_server_exceptions=False)

    return client


@pytest.mark.parametrize("policy, action", [(None, "allow"), ("strict", "refuse"), ("off", None), ("file", "warn")])
def test_the_operators_policy_is_in_force(unsure, here, chat, tmp_path, policy, action):
    (tmp_path / "policy.yaml").write_text("{name: mild, risk_threshold: 0.2, level_actions: {high: warn}}")
    options = [] if policy is None else ["--policy", tmp_path / "policy.yaml" if policy == "file" else policy]
    reply = here(unsure, *options).post("/v1/chat/completions", json={"messages": chat(RISKY), **GENERATED}).json()
    assert "error" not in reply
    assert (reply["safety"] and reply["safety"]["action"]) == action


@pytest.mark.parametrize("stream", [False, True])
def test_the_vision_tower_runs_once(judge, here, chat, monkeypatch, stream):
    from transformers import CLIPVisionModel

    runs, forward = [], CLIPVisionModel.forward
    monkeypatch.setattr(CLIPVisionModel, "forward", lambda *args, **kwargs: runs.append(1) or forward(*args, **kwargs))
    body = {"messages": chat(BENIGN), "stream": stream, **GENERATED}
    assert here(judge.folder).post("/v1/chat/completions", json=body).status_code == 200
    assert len(runs) == 1


def test_what_goes_wrong_inside_tells_nothing(judge, here, chat, monkeypatch, caplog):
    def fail(*args, **kwargs):
        raise RuntimeError("/home/secret broke")

    client = here(judge.folder)
    monkeypatch.setattr("safevlm.SafeVlmForConditionalGeneration.generate", fail)
    body = {"messages": chat(BENIGN), **GENERATED}
    reply = client.post("/v1/chat/completions", json=body)
    assert (reply.status_code, reply.json()) == (500, {"error": "internal error"})
    stream = client.post("/v1/chat/completions", json={**body, "stream": True}).text
    assert stream.endswith('data: {"error": "internal error"}\n\n') and "secret" not in stream
    assert "/home/secret broke" in caplog.text  # for the operator


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["{base}"], "MODEL '{base}' is of type 'llava', not a SafeVLM"),
        (["{judge}", "--policy", "nope"], "got 'nope'"),
        (["{judge}", "--dtype", "floaty"], "'floaty'"),
        (["{judge}", "--device", "gpu"], "found gpu"),
    ],
    ids=["base", "policy", "dtype", "device"],
)
def test_bad_options_are_one_line(judge, base, tmp_path, capsys, arguments, message):
    base.save_pretrained(tmp_path)
    names = {"base": tmp_path, "judge": judge.folder}
    assert main(["serve", *(argument.format(**names) for argument in arguments)]) == 1
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("safevlm serve: ") and message.format(**names) in last


def test_missing_packages_are_named(judge, monkeypatch, capsys):
    monkeypatch.setattr("transformers.utils.import_utils.is_serve_available", lambda: False)
    assert main(["serve", str(judge.folder)]) == 1
    assert "pip install 'safevlm[serve]'" in capsys.readouterr().err
