"""The routes, and replies in OpenAI's shape with the verdict beside them."""

import asyncio
import json
import os
import time
from collections.abc import AsyncIterator
from contextlib import aclosing
from uuid import uuid4

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, StreamingResponse
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from .answering import Answering, Finish
from .errors import RequestError, busy, client_left, internal
from .request import ChatRequest, read_request
from .worker import Job, Worker

BODY_SECONDS = 60
DONE = "data: [DONE]\n\n"


def build_app(answering: Answering, name: str, *, max_request_mb: float, seconds: float, max_waiting: int) -> FastAPI:
    """
    The server's routes; everything else is a 404.

    Args:
        name (`str`): What the model is called, a folder or a Hub id, with or without revision.
        max_request_mb (`float`): Of a request's body.
        seconds (`float`): Time a request has, the wait in the queue included. An answer is cut there.
        max_waiting (`int`): Requests in the queue.
    """
    app, started = FastAPI(openapi_url=None, redirect_slashes=False), int(time.time())
    app.state.worker = Worker(max_waiting)
    reader = BodyReader(max_bytes=int(max_request_mb * 1_000_000), max_bodies=max_waiting)

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
        job = Job(lambda job: answering.answer(request, job), seconds)
        app.state.worker.submit(job)
        return await _reply(request, name, _events(http, job))

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
    Reads requests, at most so much at a time.

    Args:
        max_bytes (`int`): Of one body.
        max_bodies (`int`): Whole bodies in memory.
    """

    def __init__(self, max_bytes: int, max_bodies: int):
        self.max_bytes, self.free = max_bytes, max_bytes * max_bodies

    async def read(self, http: Request) -> ChatRequest:
        kind = http.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != "application/json":  # what a page elsewhere may send without being allowed to is no JSON
            raise RequestError("The request's Content-Type must be application/json.", status=415)
        data, size = bytearray(), 0
        try:
            async with asyncio.timeout(BODY_SECONDS):
                async for chunk in http.stream():  # to its end: who is cut off while sending does not read why
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
            raise RequestError(f"The request's body took more than {BODY_SECONDS} seconds.", status=408) from None
        except ClientDisconnect:
            raise client_left() from None
        finally:
            self.free += len(data)


def check_model(asked: str | None, name: str):
    """Raises if a request names another model; a folder can be written in several ways."""
    known = {os.path.abspath(one) for one in (name, name.partition("@")[0])}
    if asked is not None and os.path.abspath(asked) not in known:
        raise RequestError(f"This server has the model {name!r} only.", "model", "model_not_found", 404)


async def _events(http: Request, job: Job) -> AsyncIterator:
    """A job's events. It is cancelled when the client leaves, and when nobody takes them any more."""

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


async def _reply(request: ChatRequest, name: str, events: AsyncIterator):
    head = {"id": f"chatcmpl-{uuid4().hex}", "created": int(time.time()), "model": name}
    (safety,) = await anext(events)  # what fails before the verdict has a status of its own
    if not request.stream:
        return JSONResponse(await _completion(head, safety, events))
    usage = bool(request.stream_options and request.stream_options.include_usage)
    headers = {"Cache-Control": "no-cache"}
    return StreamingResponse(_chunks(head, safety, events, usage), headers=headers, media_type="text/event-stream")


async def _completion(head: dict, safety: dict, events: AsyncIterator) -> dict:
    async with aclosing(events):
        text = ""
        async for event in events:
            match event:
                case str():
                    text += event
                case Finish():
                    finish = event
    message = {"role": "assistant", "content": text, "refusal": None}
    choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": finish.reason}
    return {**head, "object": "chat.completion", "choices": [choice], "usage": _usage(finish), "safety": safety}


async def _chunks(head: dict, safety: dict, events: AsyncIterator, usage: bool) -> AsyncIterator[str]:
    """Server-sent events: the verdict in the first chunk, before any text, and again in the last one with a choice."""

    def chunk(delta: dict | None, reason: str | None = None, **fields) -> str:
        choices = [] if delta is None else [{"index": 0, "delta": delta, "logprobs": None, "finish_reason": reason}]
        if usage:
            fields.setdefault("usage", None)
        return _sse({**head, "object": "chat.completion.chunk", "choices": choices, **fields})

    async with aclosing(events):
        yield chunk({"role": "assistant", "content": ""}, safety=safety)
        try:
            async for event in events:
                match event:
                    case str():
                        yield chunk({"content": event})
                    case Finish():
                        yield chunk({}, event.reason, safety=safety)
                        if usage:
                            yield chunk(None, usage=_usage(event))
        except RequestError as error:
            yield _sse(error.body())
        yield DONE


def _usage(finish: Finish) -> dict:
    prompt, completion = finish.prompt_tokens, finish.completion_tokens
    return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}


def _sse(value: dict) -> str:
    return f"data: {json.dumps(value, allow_nan=False)}\n\n"
