"""Bodies that no client would send: never a 500, and never slow, because all other requests wait meanwhile."""

import json
import socket
import time

import pytest
from http_client import error_of, post
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny import BENIGN, RISKY

pytestmark = pytest.mark.slow


def test_a_body_that_is_no_request_is_refused(refused):
    bodies = [b"", b"{", b"[]", b"\xff", b"[" * 100_000, b'{"a":' * 100_000, b"null", b"9" * 5000, b"NaN"]
    for body in bodies:
        status, error = refused(body=body)
        assert status == 400 and error.message.startswith("The request's body is not a JSON object")
    assert refused(body=b"{" + b" " * 2_000_000)[0] == 413


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

    from safevlm.trainer.serving.answering import Answering
    from safevlm.trainer.serving.limits import ServerLimits
    from safevlm.trainer.serving.routes import build_app

    limits = ServerLimits(max_request_mb=2, max_megapixels=1, request_timeout=60, max_waiting=4)
    app = build_app(Answering(judge.model, processor, limits.max_pixels), "demo/model", limits)
    return TestClient(app, raise_server_exceptions=False)


def check_reply(reply):
    """Accepts an error in OpenAI's shape, or a text with a verdict's action; never a 500."""
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
        (chat + "/", "POST", "application/json", 404),
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
    """Neutralising used to be quadratic: 30,000 parts took minutes."""
    began = time.thread_time()
    processor.neutralise(*[text] * 30_000)
    assert time.thread_time() - began < 2
    parts = [{"type": "text", "text": text}] * 256
    assert "<image>" not in "".join(processor.neutralise(*(part["text"] for part in parts)))


@pytest.mark.parametrize(
    "fields",
    [
        {f"field{i}": 1 for i in range(90_000)},
        {"logit_bias": {f"a{i}": "b" for i in range(90_000)}},
        {"metadata": {str(i): i for i in range(90_000)}},
        {"messages": [[]] * 90_000},
        {"messages": [{"role": "user", "content": [{"type": "text"}] * 250}] * 250},
    ],
    ids=["fields", "biases", "metadata", "messages", "parts"],
)
def test_many_wrong_values_are_refused_quickly(fields):
    """pydantic collects all errors before it reports the first: 90,000 of them blocked every client for seconds."""
    from safevlm.trainer.serving.errors import RequestError
    from safevlm.trainer.serving.request import read_request

    body = json.dumps({"messages": [{"role": "user", "content": "x"}], **fields}).encode()
    began = time.thread_time()
    with pytest.raises(RequestError, match="more than 10000 values"):
        read_request(body)
    assert time.thread_time() - began < 1


def test_as_many_values_as_a_conversation_has_are_read():
    from safevlm.trainer.serving.request import read_request

    parts = [{"type": "text", "text": "x, y"}, {"type": "image_url", "image_url": {"url": "data:", "detail": "auto"}}]
    messages = [{"role": "user", "content": parts}, *[{"role": "user", "content": parts[:1] * 2}] * 3] * 64
    bias = {str(i): 1 for i in range(1024)}
    request = read_request(json.dumps({"messages": messages, "logit_bias": bias}).encode())
    assert len(request.messages) == 256 and len(request.images) == 64 and len(request.logit_bias) == 1024
