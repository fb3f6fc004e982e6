"""Checks on every HTTP request before Gradio sees it: who sent it, how large it is, and whether uploads have room."""

from __future__ import annotations

import ipaddress
import os
from pathlib import Path

from limits import RateLimiter, Refused
from settings import Settings
from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import PlainTextResponse

POSTS_PER_REQUEST = 4  # a single question can take four: choosing a policy, asking, stopping, updating the page


class Gate:
    """
    ASGI middleware. Behind it, `request.client.host` is the visitor's address, whatever the request's headers claim.

    Args:
        app: The ASGI application.
        settings (`Settings`)
        limiter (`RateLimiter`): Counts uploads; the same one counts questions.
        uploads (`str`): The folder where Gradio stores uploads.
    """

    def __init__(self, app, settings: Settings, limiter: RateLimiter, uploads: str):
        self.app, self.settings, self.limiter, self.uploads = app, settings, limiter, uploads
        self.arriving = 0  # bytes of uploads that are being received
        # Gradio keeps every body for a while, whether it is a question or not.
        self.posts = RateLimiter(POSTS_PER_REQUEST * settings.requests_per_minute)
        # Room for Gradio's own fields, a question with every letter escaped, and the paths of uploads.
        self.max_body = 2**15 + 12 * settings.max_question_chars + 4096 * settings.max_audit_images

    async def __call__(self, scope, receive, send):
        if scope["type"] not in ("http", "websocket"):
            return await self.app(scope, receive, send)
        address = visitor_address(scope, self.settings.proxies)
        headers = [(name, value) for name, value in scope["headers"] if name != b"x-forwarded-for"]
        scope = {**scope, "client": (address, 0), "headers": headers}
        if scope["type"] == "websocket" or scope["method"] in ("GET", "HEAD", "OPTIONS"):
            return await self.app(scope, receive, send)
        upload = scope["path"].rstrip("/").endswith("/upload")
        length, refusal = self._admit(Headers(scope=scope), upload, address)
        if refusal is not None:
            return await refusal(scope, receive, send)
        self.arriving += length * upload
        try:
            return await self.app(scope, receive, send)
        finally:
            self.arriving -= length * upload

    def _admit(self, headers: Headers, upload: bool, address: str) -> tuple[int, PlainTextResponse | None]:
        length = headers.get("content-length", "0")
        # A body without a declared length could be endless. Of both headers, the server would obey the encoding.
        if "transfer-encoding" in headers or not length.isdecimal():
            return 0, PlainTextResponse("The request needs a Content-Length.", 411)
        length, file_bytes = int(length), self.settings.max_file_mb * 2**20
        if not upload and length > self.max_body:
            return length, PlainTextResponse("The request is too large.", 413)
        if upload and length > self.settings.max_audit_images * (file_bytes + 10_000):
            return length, PlainTextResponse("The upload is too large.", 413)
        try:
            if not upload:
                self.posts.check(address)
                return length, None
            self.limiter.check(address, cost=max(1, -(-length // file_bytes)))
        except Refused as error:
            return length, PlainTextResponse(str(error), 429)
        if folder_bytes(self.uploads) + self.arriving + length > self.settings.max_uploads_mb * 2**20:
            return length, PlainTextResponse("There is no room for uploads now. Try again later.", 507)
        return length, None


def visitor_address(scope, proxies: int) -> str:
    """
    The visitor's network address. For IPv6 it is the /64 network, because one visitor owns all addresses in it.

    Args:
        scope (`dict`): The ASGI scope.
        proxies (`int`): Number of trusted proxies in front. Each appends an entry to `X-Forwarded-For`. Entries that
            the client wrote itself come before those and are ignored.
    """
    lines = Headers(scope=scope).getlist("x-forwarded-for")
    forwarded = [part.strip() for part in ",".join(lines).split(",") if part.strip()]
    address = scope["client"][0] if scope.get("client") else "unknown"
    if 0 < proxies <= len(forwarded):
        address = forwarded[-proxies][:64]
    try:
        parsed = ipaddress.ip_address(address)
    except ValueError:
        return address
    parsed = getattr(parsed, "ipv4_mapped", None) or parsed
    return str(parsed) if parsed.version == 4 else str(ipaddress.ip_network((parsed, 64), strict=False))


def folder_bytes(folder: str) -> int:
    total = 0
    for path, _, names in os.walk(folder):
        for name in names:
            try:
                total += (Path(path) / name).stat().st_size
            except OSError:  # the file was deleted in the meantime
                continue
    return total


class SecurityHeaders:
    """The page loads nothing from other hosts, only the Hub may embed it, and browsers keep to declared file types."""

    POLICY = (
        "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; style-src 'self' 'unsafe-inline'; "
        "img-src 'self' data: blob:; media-src 'self' blob:; font-src 'self' data:; worker-src 'self' blob:; "
        "connect-src 'self'; object-src 'none'; base-uri 'self'; "
        "frame-ancestors 'self' https://huggingface.co https://*.hf.space"
    )

    def __init__(self, app):
        self.app = app

    async def __call__(self, scope, receive, send):
        async def send_with_headers(message):
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                headers["Content-Security-Policy"] = self.POLICY
                headers["X-Content-Type-Options"] = "nosniff"
                headers["Referrer-Policy"] = "no-referrer"
            await send(message)

        await self.app(scope, receive, send_with_headers)
