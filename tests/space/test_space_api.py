"""The page's API over HTTP: what programs receive, and what hostile clients receive."""

import json
import urllib.error
import urllib.request

import pytest
from tiny import BENIGN, RISKY

gradio_client = pytest.importorskip("gradio_client", reason="gradio is not installed; pip install 'safevlm[space]'")

LEAKS = ("Traceback", "/root", "/tmp", "site-packages", "line ")


@pytest.fixture(scope="module")
def client(page):
    return gradio_client.Client(page.url, verbose=False)


@pytest.fixture
def ask(client, example):
    def call(question=RISKY, policy="default", image=example, api_name="/answer"):
        image = None if image is None else gradio_client.handle_file(str(image))
        return client.predict(image, question, policy, api_name=api_name)

    return call


def refused(call, *args, **kwargs) -> str:
    with pytest.raises(gradio_client.exceptions.AppError) as caught:
        call(*args, **kwargs)
    message = str(caught.value)
    assert not [leak for leak in LEAKS if leak in message], message
    return message


def post(url: str, body: dict):
    request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=30) as reply:
        return json.load(reply)


def plain_call(page, name: str, data: list) -> str:
    """The server's own reply, without the checks of the client library."""
    event = post(f"{page.url}/gradio_api/call/{name}", {"data": data})["event_id"]
    with urllib.request.urlopen(f"{page.url}/gradio_api/call/{name}/{event}", timeout=60) as reply:
        return reply.read().decode()


def test_two_endpoints_are_documented_and_no_other(client):
    endpoints = client.view_api(return_format="dict")["named_endpoints"]
    assert set(endpoints) == {"/assess", "/answer"}
    names = [parameter["parameter_name"] for parameter in endpoints["/answer"]["parameters"]]
    assert names == ["image", "question", "policy"]


def test_assess_gives_the_verdict(ask):
    verdict = ask(api_name="/assess")
    assert (verdict["action"], verdict["category"], verdict["level"]) == ("refuse", "politics", "high")
    assert sum(verdict["category_probabilities"].values()) == pytest.approx(1, abs=1e-4)
    assert ask(BENIGN, api_name="/assess")["action"] == "allow"


def test_answer_streams_and_brings_the_verdict(client, example):
    job = client.submit(gradio_client.handle_file(str(example)), RISKY, "default", api_name="/answer")
    assert job.result()["answer"] == "I can't help with this request: it involves politics."
    answers = [output["answer"] for output in job.outputs()]
    assert len(set(answers)) > 3 and all(output["safety"]["action"] == "refuse" for output in job.outputs())


@pytest.mark.parametrize("policy", ["off", "paper", "<b>x</b>", "", "{}", "default.yaml"])
@pytest.mark.parametrize("api_name", ["/answer", "/assess"])
def test_only_the_operators_policies_are_served(ask, policy, api_name):
    message = refused(ask, policy=policy, api_name=api_name)
    assert message == "This policy is not offered here. Choose one of: default, strict."


def test_limits_are_said(ask, tmp_path):
    assert "301 characters; 300 are allowed" in refused(ask, "x" * 301)
    assert refused(ask, " ") == "Write a question."
    (tmp_path / "x.png").write_bytes(b"\0" * 1000)
    assert "not a picture we can read" in refused(ask, image=tmp_path / "x.png")


def test_a_file_over_the_limit_is_not_taken(page, ask, tmp_path):
    (tmp_path / "large.png").write_bytes(b"\0" * (2 * 2**20 + 1))
    with pytest.raises(Exception, match="413|exceed|Payload|size"):
        ask(image=tmp_path / "large.png")
    assert not [path for path in page.uploads.rglob("large.png") if path.stat().st_size > 2 * 2**20]


@pytest.mark.parametrize(
    "file",
    [
        {"path": "/etc/passwd", "meta": {"_type": "gradio.FileData"}},
        {"path": "/etc/passwd"},
        {"path": "../../../../etc/passwd", "meta": {"_type": "gradio.FileData"}},
        {"path": "app.py", "meta": {"_type": "gradio.FileData"}},
        {"path": "http://127.0.0.1:1/x.png", "meta": {"_type": "gradio.FileData"}},
        {"path": "\0", "meta": {"_type": "gradio.FileData"}},
        "/etc/passwd",
        7,
    ],
)
def test_a_client_cannot_name_a_file_of_the_server(page, file):
    reply = plain_call(page, "assess", [file, BENIGN, "default"])
    assert "event: error" in reply
    assert not [leak for leak in (*LEAKS, "passwd", str(page.uploads)) if leak in reply], reply


@pytest.mark.parametrize("path", ["app.py", "chat_model.py", "/etc/passwd", "../app.py", "settings.py"])
def test_the_servers_files_are_not_served(page, path):
    with pytest.raises(urllib.error.HTTPError) as caught:
        urllib.request.urlopen(f"{page.url}/gradio_api/file={path}", timeout=30)
    assert caught.value.code in (403, 404)


def test_the_page_may_load_nothing_from_elsewhere(page):
    with urllib.request.urlopen(page.url, timeout=30) as reply:
        policy = reply.headers["Content-Security-Policy"]
        assert reply.headers["X-Content-Type-Options"] == "nosniff"
    assert "default-src 'self'" in policy and "http:" not in policy and "*;" not in policy


def test_without_a_picture_the_answer_says_that_nothing_was_assessed(ask):
    assert ask(BENIGN, image=None)["safety"]["assessed"] is False
