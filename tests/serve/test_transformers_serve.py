"""`transformers serve` with a saved SafeVLM: OpenAI-style requests over loopback are answered under the policy.

The server is a process of its own that does not import safevlm: it runs the code saved with the model.
"""

import json
import sys
import urllib.error
import urllib.request

import pytest
from tiny import BENIGN, RISKY, answers, encode

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def server(judge, serving):
    command = [sys.executable, "-m", "transformers.cli.transformers", "serve", str(judge.folder)]
    with serving([*command, "--trust-remote-code"]) as server:
        yield server


@pytest.fixture(scope="module")
def ask(server, judge, chat):
    """`ask(question)`: the body of the reply."""

    def request(question: str, path: str = "/v1/chat/completions", **fields) -> str:
        body = {"model": str(judge.folder), "messages": chat(question), "temperature": 0, **fields}
        return post(server.address + path, body)

    return request


def post(url: str, body: dict) -> str:
    call = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(call, timeout=120) as reply:
        return reply.read().decode()


def text(reply: str) -> str:
    return json.loads(reply)["choices"][0]["message"]["content"]


def streamed_text(reply: str) -> str:
    chunks = [json.loads(line.removeprefix("data: ")) for line in reply.splitlines() if line.startswith("data: {")]
    assert not [chunk for chunk in chunks if "error" in chunk]
    return "".join(choice["delta"].get("content") or "" for chunk in chunks for choice in chunk["choices"])


def test_generate_takes_a_processor_for_its_tokenizer(judge, processor):
    """This is what `transformers serve` passes."""
    inputs = encode(processor, [RISKY], [1])
    policy = {"refusals": {"en": "No."}}
    output = judge.model.generate(**inputs, tokenizer=processor, max_new_tokens=64, safety_policy=policy)
    assert answers(processor, output, inputs)[0].strip() == "No."


def test_a_risky_request_gets_the_refusal(ask, judge):
    reply = ask(RISKY)
    assert text(reply).strip() == judge.refusal
    assert json.loads(reply)["choices"][0]["finish_reason"] == "stop"


def test_a_risky_request_gets_the_refusal_when_streamed(ask, judge):
    assert streamed_text(ask(RISKY, stream=True)).strip() == judge.refusal


def test_a_benign_request_gets_the_models_answer(ask, judge):
    wanted = judge.answer(BENIGN)
    assert wanted and wanted != judge.refusal
    assert text(ask(BENIGN, max_tokens=12)) == streamed_text(ask(BENIGN, max_tokens=12, stream=True)) == wanted


@pytest.mark.parametrize(
    "fields",
    [
        {"generation_config": json.dumps({"safety_policy": "off", "max_new_tokens": 64, "eos_token_id": 2})},
        {"temperature": 2.0, "top_p": 0.5, "seed": 1, "frequency_penalty": 2.0},
    ],
    ids=["generation_config", "sampling"],
)
def test_no_field_of_a_request_switches_the_policy_off(ask, judge, fields):
    assert text(ask(RISKY, **fields)).strip() == judge.refusal


def test_the_processor_refuses_a_policy_that_a_request_hands_it(ask):
    with pytest.raises(urllib.error.HTTPError):
        ask(RISKY, chat_template_kwargs={"safety_policy": "off"})


def test_a_bias_on_the_refusals_tokens_does_not_change_it(ask, judge):
    ids = {int(i) for i in judge.model.config.policy_token_ids[judge.refusal].split()}
    assert text(ask(RISKY, logit_bias={str(i): -100.0 for i in ids})).strip() == judge.refusal


def test_the_responses_endpoint_enforces_the_policy_too(server, judge, image_url):
    content = [{"type": "input_image", "image_url": image_url}, {"type": "input_text", "text": RISKY}]
    body = {"model": str(judge.folder), "input": [{"role": "user", "content": content}], "stream": False}
    output = json.loads(post(server.address + "/v1/responses", body))["output"]
    assert output[0]["content"][0]["text"].strip() == judge.refusal


def test_a_pinned_server_serves_no_other_model(ask):
    with pytest.raises(urllib.error.HTTPError, match="400"):
        ask(RISKY, model="some/unsafe-base")
