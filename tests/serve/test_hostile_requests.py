"""`safevlm serve` under abuse: no field, body, picture or connection that gets past the policy or stops the server."""

import base64
import io
import json
import os
import socket
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from http_client import GENERATED, error_of, post
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from tiny import BENIGN, RISKY

pytestmark = pytest.mark.slow


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
    status, error = refused(chat(RISKY), **fields)
    assert status == 400 and error.param in fields and error.message.startswith(error.param)


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
        status, error = refused(chat(BENIGN, image=url))
        assert (status, error.message.partition(" must")[0]) == (400, "Image 1")
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
        ([{"role": "user", "content": [{"type": "text"}]}], "messages.0.content.0.text: "),
        ([{"role": "user", "content": "hi " * 2000}], "The prompt has "),
    ],
    ids=["none", "empty", "many", "role", "no_text", "long"],
)
def test_messages_that_cannot_be_answered_are_refused(refused, messages, message):
    status, error = refused(messages)
    assert status == 400 and error.message.startswith(message)


VALUES = {
    "max_tokens": [0, -1, 1.5, "9", True, 2**80, [], {}],
    "max_completion_tokens": [0, "x"],
    "temperature": ["hot", -0.1, 2.1, True, []],
    "top_p": [-0.1, 1.1, "x"],
    "seed": [2**80, 1.5, "1"],
    "frequency_penalty": [-2.1, 2.1, "x"],
    "presence_penalty": [-2.1, 2.1],
    "logit_bias": [{"a": 1}, {"-1": 1}, {"99999999": 1}, {"384": 1}, {"5": 101}, {"5": None}, [1], {"1": 1} | {
        str(i): 0 for i in range(2000)
    }],
    "stop": [[1], "", [""], ["a"] * 5, "a" * 257, ["a" * 100_000] * 4, [str(i) for i in range(20_000)], [None], 1],
    "stream": ["yes", 1],
    "stream_options": [[], {"include_usage": 1}, {"x": 1}],
    "model": [1, [], "x" * 10_000],
    "user": [1, "x" * 10_000],
    "metadata": [1, {"a": 1}, {str(i): "" for i in range(99)}],
}  # fmt: skip


@pytest.mark.parametrize("field", VALUES)
def test_values_out_of_range_are_refused_by_name(server, chat, field):
    for value in VALUES[field]:
        status, text = post(server, body=json.dumps({"messages": chat(BENIGN), **GENERATED, field: value}).encode())
        error = error_of(text)
        assert status == 400 and error.param.startswith(field) and error.message.startswith(field), (value, text)


UNSUPPORTED = {
    "n": 2, "logprobs": True, "top_logprobs": 5, "response_format": {"type": "json_object"}, "tool_choice": "required",
    "tools": [{"type": "function", "function": {"name": "f"}}], "functions": [{"name": "f"}], "function_call": "f",
    "modalities": ["text", "audio"], "audio": {"voice": "x", "format": "wav"}, "prediction": {"type": "content"},
    "reasoning_effort": "high", "verbosity": "low", "service_tier": "flex", "store": True, "web_search_options": {},
}  # fmt: skip
HARMLESS = {
    "n": 1, "logprobs": False, "response_format": {"type": "text"}, "tool_choice": "auto", "tools": [], "user": "me",
    "modalities": ["text"], "service_tier": "auto", "store": False, "parallel_tool_calls": True, "seed": 1, "stop": [],
    "metadata": {"a": "b"}, "max_completion_tokens": 3, "top_p": 0, "logit_bias": {}, "temperature": 1e-300,
}  # fmt: skip


def test_each_field_of_openais_works_or_is_refused_by_name(server, chat):
    for field, value in UNSUPPORTED.items():
        status, text = post(server, body=json.dumps({"messages": chat(BENIGN), **GENERATED, field: value}).encode())
        error = error_of(text)
        assert (status, error.param, error.code) == (400, field, "unsupported_parameter")
        assert error.message.startswith(f"{field}: this server does not support it; leave it out")
    every_field_absent = dict.fromkeys([*UNSUPPORTED, *HARMLESS, "stream", "stream_options", "max_tokens"])
    for fields in (HARMLESS, every_field_absent | {"max_tokens": 3}):
        status, text = post(server, body=json.dumps({"messages": chat(BENIGN), **GENERATED, **fields}).encode())
        assert status == 200 and json.loads(text)["safety"]["action"] == "allow"


def test_the_client_shows_what_is_wrong(ask, chat):
    import openai

    with pytest.raises(openai.BadRequestError, match="stop.0: Input should be a valid string") as caught:
        ask(chat(BENIGN), stop=[1])
    assert (caught.value.param, caught.value.code) == ("stop.0", "invalid_value")


@pytest.mark.parametrize("role", ["system", "developer", "assistant"])
def test_images_outside_a_question_are_refused(refused, chat, role):
    status, error = refused([{**chat(BENIGN)[0], "role": role}, *chat(BENIGN)])
    assert (status, error.param) == (400, "messages.0.content.0.type")


def test_a_body_that_is_no_request_is_refused(refused):
    bodies = [b"", b"{", b"[]", b"\xff", b"[" * 100_000, b'{"a":' * 100_000, b"null", b"9" * 5000, b"NaN"]
    for body in bodies:
        status, error = refused(body=body)
        assert status == 400 and error.message.startswith("The request's body is not a JSON object")
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
        status, error = refused(chat(BENIGN, image=data_url((odd_files / name).read_bytes())))
        assert status == 400 and error.message.startswith("Image 1 ") and reason in error.message
    assert refused(chat(BENIGN, image=image_url + "?"))[1].message.startswith("Image 1 is not base64")


def png(width: int, height: int) -> str:
    buffer = io.BytesIO()
    Image.new("1", (width, height)).save(buffer, "PNG", optimize=True)
    return data_url(buffer.getvalue())


def test_large_images_are_refused_alone_and_together(refused, chat):
    """Some kilobytes can hold as many pixels as gigabytes of memory."""
    for number, size in ((1, 7000), (2, 4900)):
        part = chat(BENIGN, image=png(size, size))[0]["content"][0]
        status, error = refused([{"role": "user", "content": [part] * 4}])
        assert status == 400 and error.message.startswith(f"Image {number} has {size}x{size} pixels, more than ")


def test_a_thin_image_is_refused(refused, chat):
    """CLIP scales the shorter side to 336: one of 1x50,000 would become 5 gigapixels."""
    for size in ((1, 50_000), (50_000, 1)):
        status, error = refused(chat(BENIGN, image=png(*size)))
        assert status == 400 and "may be at most 200 times the other" in error.message


JUNK = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
FIELDS = [
    "model", "stream", "stream_options", "max_tokens", "max_completion_tokens", "temperature", "top_p", "seed",
    "frequency_penalty", "presence_penalty", "logit_bias", "stop", "user", "metadata", "n", "logprobs", "tools",
    "response_format", "tool_choice", "safety_policy", "reasoning_effort", "store", "eos_token_id",
]  # fmt: skip
SENSIBLE = {
    "temperature": st.floats(0, 2), "top_p": st.floats(0, 1), "frequency_penalty": st.floats(-2, 2), "stop": st.lists(
        st.text(max_size=3), max_size=4), "presence_penalty": st.floats(-2, 2), "seed": st.integers(-(2**63), 2**63),
    "logit_bias": st.dictionaries(st.integers(0, 400).map(str), st.floats(-100, 100), max_size=5),
    "stream": st.booleans(), "stream_options": st.just({"include_usage": True}),
}  # fmt: skip
URL = st.fixed_dictionaries({"url": st.text(max_size=30)})
PART = st.fixed_dictionaries(
    {"type": st.sampled_from(["text", "image_url"]) | JUNK},
    optional={"text": st.text(max_size=30) | JUNK, "image_url": URL | JUNK},
)
MESSAGE = st.fixed_dictionaries(
    {"role": st.sampled_from(["user", "assistant", "system", "developer", "tool"])},
    optional={"content": st.text(max_size=30) | st.lists(PART, max_size=3) | JUNK, "name": JUNK},
)


@pytest.fixture(scope="module")
def app(judge, processor):
    from starlette.testclient import TestClient

    from safevlm.trainer.serving import Answering, build_app

    answering = Answering(judge.model, processor, max_pixels=1_000_000)
    app = build_app(answering, "demo/model", max_request_mb=2, seconds=60, max_waiting=4)
    return TestClient(app, raise_server_exceptions=False)


def check_reply(reply):
    """Never a 500; an error in OpenAI's shape, or a text with a verdict's action."""
    assert reply.status_code < 500, reply.text
    if reply.status_code != 200:
        assert error_of(reply.text).message
    elif reply.headers["content-type"].startswith("text/event-stream"):
        *events, done, rest = reply.text.split("\n\n")
        assert (done, rest) == ("data: [DONE]", "")
        assert json.loads(events[0].removeprefix("data: "))["safety"]["action"] in ("allow", "refuse")
    else:
        assert json.loads(reply.text)["safety"]["action"] in ("allow", "refuse")


@settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data(), risky=st.booleans())
def test_no_value_of_a_field_is_a_500(app, chat, judge, data, risky):
    fields = data.draw(st.lists(st.sampled_from(FIELDS), max_size=3, unique=True))
    values = {name: data.draw(SENSIBLE.get(name, st.nothing()) | JUNK) for name in fields}
    body = {"messages": chat(RISKY if risky else BENIGN), "max_tokens": 3, **values}
    reply = app.post("/v1/chat/completions", content=json.dumps(body), headers={"Content-Type": "application/json"})
    check_reply(reply)
    if reply.status_code == 200 and risky:
        text = "" if body.get("stream") else reply.json()["choices"][0]["message"]["content"]
        assert judge.refusal.startswith(text) and '"refuse"' in reply.text


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(messages=st.lists(MESSAGE | JUNK, max_size=4) | JUNK)
def test_no_message_is_a_500(app, messages):
    body = json.dumps({"messages": messages, "max_tokens": 2})
    check_reply(app.post("/v1/chat/completions", content=body, headers={"Content-Type": "application/json"}))


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(body=st.binary(max_size=60), kind=st.sampled_from(["application/json", "text/plain", "", "a/b; c=d"]))
def test_no_body_is_a_500(app, body, kind):
    check_reply(app.post("/v1/chat/completions", content=body, headers={"Content-Type": kind}))


@pytest.mark.parametrize(
    "body",
    [
        b'{"messages": [{"role": "user", "content": "\\ud800"}]}',
        b'{"messages": [{"role": "user", "content": "\\udfff\\ud800"}]}',
        b'{"messages": [{"role": "user", "content": "x"}], "user": "\\ud800"}',
        b'{"messages": [{"role": "user", "content": "x"}], "temperature": NaN}',
        b'{"messages": [{"role": "user", "content": "x"}], "temperature": 1e999}',
        b'{"messages": [{"role": "user", "content": "x"}], "logit_bias": {"1": -Infinity}}',
        b'{"messages": [{"role": "user", "content": "x"}], "metadata": {"x": NaN}}',
        b'{"messages": [{"role": "user", "content": "x"}], "n": NaN}',
        b'{"messages": [{"role": "user", "content": "x"}], "seed": ' + b"9" * 10_000 + b"}",
    ],
)
def test_lone_surrogates_and_what_is_no_number_are_refused(app, body):
    reply = app.post("/v1/chat/completions", content=body, headers={"Content-Type": "application/json"})
    assert reply.status_code == 400 and error_of(reply.text).message


def test_statuses_of_http_have_openais_shape(server):
    chat = "/v1/chat/completions"
    for path, method, kind, status in [
        ("/", "GET", "", 404),
        (chat, "GET", "", 405),
        ("/v1/models", "POST", "application/json", 405),
        (chat, "POST", "text/plain", 415),
        (chat, "POST", "multipart/form-data", 415),
        (chat, "POST", "application/json", 400),
    ]:
        found, text = post(server, path, b"{}", method, kind)
        assert (found, bool(error_of(text).message)) == (status, True)
    with socket.create_connection(("127.0.0.1", server.port)) as connection:
        connection.sendall(b"GET / HTTP/9\r\n\x00\r\n\r\n")
        head, _, body = connection.makefile().read().partition("\n\n")
    assert " 400 " in head and error_of(body).message


def test_an_oversized_prompt_is_refused_before_it_is_rendered(app, monkeypatch):
    monkeypatch.setattr("safevlm.SafeVlmProcessor.apply_chat_template", None)
    turns = [{"role": role, "content": "word " * 20} for role in ("user", "assistant")] * 128
    for messages in (turns, [{"role": "user", "content": "x " * 20_000}]):
        reply = app.post("/v1/chat/completions", json={"messages": messages})
        assert reply.status_code == 400 and error_of(reply.text).code == "context_length_exceeded"


@pytest.mark.parametrize("text", ["", "x", "<", "<ima", "<image>"])
def test_many_text_parts_take_time_with_their_number(processor, text):
    """Neutralising was quadratic: 30,000 parts took minutes."""
    began = time.monotonic()
    processor.neutralise(*[text] * 30_000)
    assert time.monotonic() - began < 2
    parts = [{"type": "text", "text": text}] * 256
    assert "<image>" not in "".join(processor.neutralise(*(part["text"] for part in parts)))


def test_huge_bodies_of_wrong_values_are_read_quickly():
    from safevlm.trainer.serving.errors import RequestError
    from safevlm.trainer.serving.request import read_request

    messages = [{"role": "user", "content": "x"}]
    for fields in (
        {f"field{i}": 1 for i in range(200_000)},
        {"logit_bias": {str(i): "x" for i in range(99_000)}},
        {"messages": [[]] * 99_000},
    ):
        body, began = json.dumps({"messages": messages, **fields}).encode(), time.monotonic()
        with pytest.raises(RequestError):
            read_request(body)
        assert time.monotonic() - began < 5
