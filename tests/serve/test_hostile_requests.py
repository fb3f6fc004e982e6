"""`safevlm serve` under abuse: no field, picture or message gets past the policy or stops the server."""

import base64
import io
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from http_client import GENERATED, error_of, post
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
    """The address of a server that must not be contacted, and the requests it received."""
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
        ([{"role": "assistant", "content": None}], "messages.0.content: must be a string or a list"),
        (
            [{"role": "user", "content": "\N{SHIELD}" * 9_000}],
            "The messages have 9000 characters of text, more than the model",
        ),
        ([{"role": "tool", "content": "hi"}], "messages.0.role: "),
        ([{"role": "user", "content": [{"type": "text"}]}], "messages.0.content.0.text: "),
        ([{"role": "user", "content": "hi " * 300}], "The prompt has "),
    ],
    ids=["none", "empty", "many", "null", "characters", "role", "no_text", "long"],
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
    "stop": [[1], "", [""], ["a"] * 5, "a" * 257, ["a" * 100_000] * 4, [str(i) for i in range(5_000)], [None], 1],
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
    """A few kilobytes can decode to gigabytes of pixels."""
    for number, size in ((1, 7000), (2, 4900)):
        part = chat(BENIGN, image=png(size, size))[0]["content"][0]
        status, error = refused([{"role": "user", "content": [part] * 4}])
        assert status == 400 and error.message.startswith(f"Image {number} has {size}x{size} pixels, more than ")


def test_many_small_images_are_refused(refused, chat):
    """Each one is enlarged: 2,000 single pixels, 300 kilobytes in all, became gigabytes."""
    part = chat(BENIGN, image=png(1, 1))[0]["content"][0]
    status, error = refused([{"role": "user", "content": [part] * 65}])
    assert status == 400 and error.message == "The request has 65 images, more than 64."


def test_a_thin_image_is_refused(refused, chat):
    """CLIP enlarges the shorter side to 336 pixels: a picture of 1x50,000 would become 5 gigapixels."""
    for size in ((1, 50_000), (50_000, 1)):
        status, error = refused(chat(BENIGN, image=png(*size)))
        assert status == 400 and "may be at most 200 times the other" in error.message
