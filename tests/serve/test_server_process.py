"""`safevlm serve` as a process: endless work and stalled connections are ended, and it stops when asked to."""

import json
import shutil
import signal
import socket
import sys
import threading
import time
from contextlib import ExitStack, contextmanager

import pytest
from http_client import GENERATED, error_of, post
from tiny import BENIGN, RISKY

pytestmark = pytest.mark.slow
ENDLESS = {"logit_bias": {"2": -100}, "max_tokens": 10**9, "temperature": 0}


@pytest.fixture(scope="module")
def endless(judge, processor, in_thread):
    """A server whose model has unlimited context; one request can wait."""
    with in_thread(judge.model, processor, endless=True, max_waiting=1) as server:
        yield server


@contextmanager
def sent(server, body: dict, method="POST", **headers):
    """A connection on which a request was sent and nothing has been read."""
    content = json.dumps(body).encode()
    headers = {"Content-Type": "application/json", "Content-Length": len(content), "Host": "x", **headers}
    head = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
    with socket.create_connection(("127.0.0.1", server.port), timeout=60) as connection:
        connection.sendall(f"{method} /v1/chat/completions HTTP/1.1\r\n{head}\r\n".encode() + content)
        yield connection


def is_busy(server) -> bool:
    return server.app.state.worker.running is not None


def wait_for(condition, seconds: float = 10):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.02)


@pytest.mark.parametrize("stream", [False, True])
def test_a_request_whose_client_left_is_not_computed_to_the_end(endless, chat, stream):
    with sent(endless, {"messages": chat(BENIGN), "stream": stream, **ENDLESS}) as connection:
        wait_for(lambda: is_busy(endless))
        if stream:
            assert b"200 OK" in connection.recv(1000)
    wait_for(lambda: not is_busy(endless))
    status, text = post(endless, body=json.dumps({"messages": chat(RISKY), **GENERATED}).encode())
    assert status == 200 and json.loads(text)["safety"]["action"] == "refuse"


def test_a_full_queue_is_a_503_and_who_left_it_makes_room(endless, chat):
    body = {"messages": chat(BENIGN), **ENDLESS}
    wait_for(lambda: not is_busy(endless))  # the answer arrives before the worker is free
    with ExitStack() as connections:
        connections.enter_context(sent(endless, body))
        wait_for(lambda: is_busy(endless))  # until then it counts as waiting
        connections.enter_context(sent(endless, body))
        wait_for(lambda: len(endless.app.state.worker.waiting) == 1)
        third = connections.enter_context(sent(endless, body, Connection="close"))
        head, _, text = third.makefile().read().partition("\n\n")
        assert " 503 " in head and "retry-after: 5" in head.lower() and error_of(text).code == "overloaded"
    wait_for(lambda: not is_busy(endless))
    assert post(endless, body=json.dumps({"messages": chat(RISKY), **GENERATED}).encode())[0] == 200


@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_is_cut_at_the_time_limit(judge, processor, in_thread, chat, stream):
    with in_thread(judge.model, processor, endless=True, seconds=0.6) as server:
        began = time.monotonic()
        body = {"messages": chat(BENIGN), "stream": stream, **ENDLESS}
        status, text = post(server, body=json.dumps(body).encode())
        assert time.monotonic() - began < 10
    assert status == 200 and '"finish_reason": "length"' in text.replace('":"', '": "')


def test_who_waited_too_long_gets_a_503(judge, processor, in_thread, chat):
    with in_thread(judge.model, processor, endless=True, seconds=0.6) as server:
        body = {"messages": chat(BENIGN), **ENDLESS}
        with sent(server, body):
            wait_for(lambda: is_busy(server))
            time.sleep(0.1)
            server.app.state.worker.running.deadline += 1  # the request before it takes longer
            status, text = post(server, body=json.dumps(body).encode())
    assert status == 503 and error_of(text).code == "overloaded"


def test_connections_that_send_nothing_or_too_slowly_are_closed(server, monkeypatch):
    monkeypatch.setattr("safevlm.trainer.serving.limits.HEADER_SECONDS", 0.5)
    monkeypatch.setattr("safevlm.trainer.serving.limits.BODY_SECONDS", 0.5)
    head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\n"
    for begin in (b"", b"GET", head, b"GET /health HTTP/1.1\r\nHost: x\r\n\r\nGET"):
        with socket.create_connection(("127.0.0.1", server.port), timeout=10) as connection:
            connection.sendall(begin)
            while connection.recv(10_000):
                pass
    with socket.create_connection(("127.0.0.1", server.port), timeout=10) as connection:
        connection.sendall(head + b"Content-Type: application/json\r\nContent-Length: 100\r\n\r\n{")
        assert b"408 " in connection.recv(10_000)
        while connection.recv(10_000):
            pass


def test_there_are_only_so_many_connections(server, monkeypatch):
    monkeypatch.setattr("safevlm.trainer.serving.limits.MAX_CONNECTIONS", 3)
    open_ones = [socket.create_connection(("127.0.0.1", server.port), timeout=10) for _ in range(6)]
    closed = 0
    for connection in open_ones[3:]:
        try:
            closed += connection.recv(1) == b""
        except ConnectionResetError:
            closed += 1
    for connection in open_ones:
        connection.close()
    assert closed == 3
    wait_for(lambda: post(server, "/health", method="GET")[0] == 200)


def test_bodies_being_read_share_a_budget(chat):
    """What slow clients have sent so far is kept: all of it together must not fill the memory."""
    import asyncio

    from starlette.requests import Request

    from safevlm.trainer.serving.errors import RequestError
    from safevlm.trainer.serving.routes import BodyReader

    reader = BodyReader(max_bytes=100, max_bodies=2)
    body = json.dumps({"messages": [{"role": "user", "content": "x"}]}).encode()

    def request(more: asyncio.Event, content: bytes):
        pieces = [content]

        async def receive():
            if pieces:
                return {"type": "http.request", "body": pieces.pop(), "more_body": True}
            await more.wait()
            return {"type": "http.request", "body": b"", "more_body": False}

        scope = {"type": "http", "headers": [(b"content-type", b"application/json")], "method": "POST", "path": "/"}
        return Request(scope, receive)

    async def fill():
        more = asyncio.Event()
        slow = [asyncio.create_task(reader.read(request(more, body.ljust(90)))) for _ in range(2)]
        await asyncio.sleep(0)
        try:
            await asyncio.sleep(0.05)
            with pytest.raises(RequestError) as caught:
                await reader.read(request(more, body))
            assert caught.value.status == 503
        finally:
            more.set()
        assert [len((await task).messages) for task in slow] == [1, 1]
        assert reader.free == 200
        assert (await reader.read(request(more, body))).texts == ["x"]

    asyncio.run(fill())


def test_who_leaves_while_sending_is_no_failure_of_the_server(server):
    """Each one used to leave a traceback in the operator's log."""
    import asyncio

    path, events, sent = "/v1/chat/completions", [{"type": "http.request", "body": b"{", "more_body": True}], []
    scope = {"type": "http", "method": "POST", "path": path, "query_string": b"", "headers": []}
    scope["headers"].append((b"content-type", b"application/json"))

    async def receive():
        return events.pop() if events else {"type": "http.disconnect"}

    async def send(message):
        sent.append(message)

    asyncio.run(server.app(scope, receive, send))
    assert sent[0]["status"] == 499


def test_it_says_where_it_listens_and_ends_within_ten_seconds_of_sigterm(judge, serving, tmp_path, chat):
    """During an endless request, with another one waiting and an idle connection."""
    folder = tmp_path / "model"
    shutil.copytree(judge.folder, folder)
    config = json.loads((folder / "config.json").read_text())
    config["base_config"]["text_config"]["max_position_embeddings"] = 10**6
    (folder / "config.json").write_text(json.dumps(config))
    replies = []
    with serving([sys.executable, "-m", "safevlm.trainer.cli", "serve", str(folder)]) as server:
        assert f"Serving {folder} at {server.address}/v1\n" in server.log.read_text()
        body = json.dumps({"messages": chat(BENIGN), **ENDLESS}).encode()
        threads = [
            threading.Thread(target=lambda: replies.append(post(server, body=body)), daemon=True) for _ in range(2)
        ]
        for thread in threads:
            thread.start()
        with socket.create_connection(("127.0.0.1", int(server.address.rpartition(":")[2]))):
            time.sleep(2)
            assert not replies
            began = time.monotonic()
            server.process.send_signal(signal.SIGTERM)
            server.process.wait(timeout=10)
            assert time.monotonic() - began < 10
        for thread in threads:
            thread.join(timeout=10)
    assert [(status, error_of(text).code) for status, text in replies] == [(503, "overloaded")] * 2
