"""The gate: visitors cannot choose the address they are counted under, and bodies and uploads are limited."""

import asyncio
import importlib
import urllib.error
import urllib.request
from types import SimpleNamespace

import pytest

pytest.importorskip("starlette")


@pytest.fixture
def gate(modules):
    return importlib.import_module("gate")


def scope(forwarded=(), peer="10.0.0.1", method="POST", path="/gradio_api/upload", **headers):
    lines = [(b"x-forwarded-for", line.encode()) for line in forwarded]
    others = [(name.replace("_", "-").encode(), str(value).encode()) for name, value in headers.items()]
    return {
        "type": "http",
        "method": method,
        "path": path,
        "headers": [*others, *lines],
        "client": (peer, 1),
        "query_string": b"",
    }


@pytest.mark.parametrize(
    ("forwarded", "proxies", "address"),
    [
        ([], 0, "10.0.0.1"),
        (["1.1.1.1"], 0, "10.0.0.1"),  # no trusted proxy wrote it
        (["1.1.1.1"], 1, "1.1.1.1"),
        (["6.6.6.6, 1.1.1.1"], 1, "1.1.1.1"),  # the client wrote the first one itself
        (["6.6.6.6", "1.1.1.1"], 1, "1.1.1.1"),  # and a line of its own
        (["6.6.6.6, 7.7.7.7", "8.8.8.8,1.1.1.1"], 1, "1.1.1.1"),
        (["6.6.6.6, 1.1.1.1, 2.2.2.2"], 2, "1.1.1.1"),
        (["6.6.6.6, 1.1.1.1", "2.2.2.2"], 2, "1.1.1.1"),
        ([], 1, "10.0.0.1"),
        (["2001:db8::1"], 1, "2001:db8::/64"),
        (["2001:db8::ffff"], 1, "2001:db8::/64"),  # one visitor owns the whole network
        (["::ffff:1.1.1.1"], 1, "1.1.1.1"),
        (["x" * 1000], 1, "x" * 64),
    ],
)
def test_a_client_cannot_choose_its_address(gate, forwarded, proxies, address):
    assert gate.visitor_address(scope(forwarded), proxies) == address


@pytest.fixture
def passing(modules, gate, tmp_path):
    """`passing(scope)`: the scope that the application behind the gate receives, or the status of a refusal."""

    def build(**settings):
        seen = []

        async def app(scope, receive, send):
            seen.append(scope)

        settings = modules.settings.Settings("m", **settings)
        limiter = modules.limits.RateLimiter(settings.requests_per_minute)
        guarded = gate.Gate(app, settings, limiter, str(tmp_path))

        def call(scope):
            sent = []

            async def send(message):
                sent.append(message)

            asyncio.run(guarded(scope, None, send))
            return sent[0]["status"] if sent else seen.pop()

        return call

    return build


def test_the_application_sees_the_visitors_address_and_no_claim(passing):
    seen = passing(proxies=1)(scope(["6.6.6.6", "1.1.1.1"], content_length=5, host="x"))
    assert seen["client"][0] == "1.1.1.1" and seen["headers"] == [(b"content-length", b"5"), (b"host", b"x")]


def test_uploads_count_against_the_rate_by_their_size(passing):
    call = passing(requests_per_minute=4, max_file_mb=1)
    assert "client" in call(scope(content_length=10)) and "client" in call(scope(content_length=2**20 + 1))
    assert call(scope(content_length=2**20 + 1)) == 429  # it counts as two, and one request is left
    assert "client" in call(scope(content_length=10)) and call(scope(content_length=10)) == 429
    assert "client" in call(scope(content_length=10, peer="10.0.0.2"))


def test_bodies_have_a_largest_size(passing):
    call = passing(max_file_mb=1, max_audit_images=2)
    assert call(scope(content_length=3 * 2**20)) == 413
    assert call(scope(path="/gradio_api/queue/join", content_length=65_000 + 1)) == 413
    assert "client" in call(scope(path="/gradio_api/queue/join", content_length=64_000))
    for upload in ("/gradio_api/upload", "/upload/", "/gradio_api/call/answer"):
        for length in ({}, {"content_length": 10}):  # the server would read the chunks
            assert call(scope(path=upload, transfer_encoding="chunked", **length)) == 411
    assert call(scope(content_length="9" * 30)) == 413


def test_all_that_is_posted_counts(passing):
    """Gradio keeps each body for a while, and bodies that were not questions used to be uncounted."""
    call = passing(requests_per_minute=2)
    post = scope(path="/gradio_api/queue/join", content_length=10)
    assert all("client" in call(post) for _ in range(8)) and call(post) == 429
    assert "client" in call(scope(path="/gradio_api/queue/join", content_length=10, peer="10.0.0.2"))


def test_uploads_share_a_budget_on_disk(passing, tmp_path):
    call = passing(max_uploads_mb=1)
    assert "client" in call(scope(content_length=600_000))
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder/upload.png").write_bytes(bytes(600_000))
    assert call(scope(content_length=600_000)) == 507
    assert "client" in call(scope(content_length=300_000))


def test_a_running_page_refuses_large_bodies(page):
    request = urllib.request.Request(f"{page.url}/gradio_api/queue/join", b" " * 100_000)
    with pytest.raises(urllib.error.HTTPError, match="413"):
        urllib.request.urlopen(request, timeout=30)


def test_uvicorn_takes_no_address_from_a_header(modules, monkeypatch):
    """By default it trusts requests from this machine, such as those through a tunnel."""
    uvicorn, launched = pytest.importorskip("uvicorn"), {}
    app = importlib.import_module("app")
    monkeypatch.setenv("SAFEVLM_MODEL", "me/m")
    monkeypatch.setenv("FORWARDED_ALLOW_IPS", "127.0.0.1")
    monkeypatch.setattr(app, "ChatModel", lambda settings: None)
    monkeypatch.setattr(
        app, "build_page", lambda *args: SimpleNamespace(launch=lambda **options: launched.update(options))
    )
    app.main()
    gates = [one for one in launched["app_kwargs"]["middleware"] if one.cls.__name__ == "Gate"]
    assert len(gates) == 1 and launched["state_session_capacity"] <= 256
    seen = []

    async def asgi(scope, receive, send):
        seen.append(scope["client"][0])

    config = uvicorn.Config(asgi, interface="asgi3")
    config.load()
    asyncio.run(config.loaded_app(scope(["6.6.6.6"], peer="127.0.0.1"), None, None))
    assert seen == ["127.0.0.1"]
