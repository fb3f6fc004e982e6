"""The server's HTTP routes: what each address does, how a body is read, and what stops a request whose client left."""

import asyncio
import os
import time
from collections.abc import AsyncIterator

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from . import limits
from .answering import Answering
from .errors import RequestError, busy, client_left, internal
from .limits import ServerLimits
from .replies import reply
from .request import ChatRequest, read_request
from .worker import Job, Worker


def build_app(answering: Answering, name: str, settings: ServerLimits) -> FastAPI:
    """
    The server's routes. Any other address is a 404.

    Args:
        answering (`Answering`)
        name (`str`): The model's name: a folder or a Hub id, with or without a revision.
        settings (`ServerLimits`)
    """
    app, started = FastAPI(openapi_url=None, redirect_slashes=False), int(time.time())
    app.state.worker = Worker(settings.max_waiting)
    reader = BodyReader(settings.max_body_bytes, settings.max_waiting)

    @app.exception_handler(RequestError)
    async def refused(http, error):
        return JSONResponse(error.body(), error.status, error.headers)

    @app.exception_handler(HTTPException)
    async def no_such_route(http, error):
        refusal = RequestError(f"{http.method} {http.url.path}: {error.detail}.", status=error.status_code)
        return JSONResponse(refusal.body(), error.status_code, error.headers)

    @app.exception_handler(Exception)
    async def failed(http, error):
        return JSONResponse(internal().body(), 500)

    @app.post("/v1/chat/completions")
    async def chat_completions(http: Request):
        request = await reader.read(http)
        check_model(request.model, name)
        job = Job(lambda job: answering.answer(request, job), settings.request_timeout)
        app.state.worker.submit(job)
        return await reply(request, name, _events(http, job))

    model = {"id": name, "object": "model", "created": started, "owned_by": "safevlm"}

    @app.get("/v1/models")
    async def models():
        return {"object": "list", "data": [model]}

    @app.get("/v1/models/{asked:path}")
    async def one_model(asked: str):
        check_model(asked, name)
        return model

    @app.get("/health")
    async def health():
        return {"status": "ok"}

    return app


class BodyReader:
    """
    Reads the bodies of requests, within a budget of memory for all of them together.

    Args:
        max_bytes (`int`): Size of the largest body.
        max_bodies (`int`): How many bodies of that size may be in memory at a time.
    """

    def __init__(self, max_bytes: int, max_bodies: int):
        self.max_bytes, self.free = max_bytes, max_bytes * max_bodies

    async def read(self, http: Request) -> ChatRequest:
        """
        Raises:
            `RequestError`: The body is too large, too slow, not JSON, or not a valid request.
        """
        content_type = http.headers.get("content-type", "").partition(";")[0].strip().lower()
        if content_type != "application/json":  # the types that other web pages may send unasked are not JSON
            raise RequestError("The request's Content-Type must be application/json.", status=415)
        data, size = bytearray(), 0
        try:
            async with asyncio.timeout(limits.BODY_SECONDS):
                # Reads to the end: a client cut off mid-upload never sees the 413.
                async for chunk in http.stream():
                    size += len(chunk)
                    if size <= self.max_bytes:
                        if len(chunk) > self.free:
                            raise busy("Too many requests are being read. Try again in a while.")
                        self.free -= len(chunk)
                        data += chunk
            if size > self.max_bytes:
                raise RequestError(f"The request has {size} bytes, more than {self.max_bytes}.", status=413)
            return read_request(data)
        except TimeoutError:
            message = f"The request's body took more than {limits.BODY_SECONDS} seconds."
            raise RequestError(message, status=408) from None
        except ClientDisconnect:
            raise client_left() from None
        finally:
            self.free += len(data)


def check_model(asked: str | None, name: str):
    """
    Raises:
        `RequestError`: A request asks for another model. A folder can be written in several ways.
    """
    names = {os.path.abspath(path) for path in (name, name.partition("@")[0])}
    if asked is not None and os.path.abspath(asked) not in names:
        raise RequestError(f"This server has the model {name!r} only.", "model", "model_not_found", 404)


async def _events(http: Request, job: Job) -> AsyncIterator:
    """Yields what a job sends. Cancels the job when its client leaves, or when nobody reads the events any more."""

    async def watch():
        while (await http.receive())["type"] != "http.disconnect":
            pass
        job.cancel(client_left())

    watching = asyncio.create_task(watch())
    try:
        while (event := await job.next()) is not None:
            yield event
    finally:
        watching.cancel()
        job.cancel()
