"""Replies in OpenAI's shape, whole or streamed, with the verdict as `safety`."""

import json
import time
from collections.abc import AsyncIterator
from contextlib import aclosing
from uuid import uuid4

from fastapi.responses import JSONResponse, StreamingResponse

from .answering import Finish
from .errors import RequestError
from .request import ChatRequest

DONE = "data: [DONE]\n\n"


async def reply(request: ChatRequest, name: str, events: AsyncIterator) -> JSONResponse | StreamingResponse:
    """
    Args:
        name (`str`): The model's name.
        events (`AsyncIterator`): What [`Answering.answer`] sends: `(verdict,)`, then texts, then a `Finish`.

    Raises:
        `RequestError`: The request failed before its verdict. If it fails later, the error is the last event of a
            stream, whose HTTP status has already been sent.
    """
    head = {"id": f"chatcmpl-{uuid4().hex}", "created": int(time.time()), "model": name}
    (safety,) = await anext(events)
    if not request.stream:
        return JSONResponse(await _completion(head, safety, events))
    with_usage = bool(request.stream_options and request.stream_options.include_usage)
    chunks = _chunks(head, safety, events, with_usage)
    return StreamingResponse(chunks, headers={"Cache-Control": "no-cache"}, media_type="text/event-stream")


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


async def _chunks(head: dict, safety: dict, events: AsyncIterator, with_usage: bool) -> AsyncIterator[str]:
    """Server-sent events. The first chunk, which has no text, and the one that finishes carry the verdict."""

    def chunk(delta: dict | None, reason: str | None = None, **fields) -> str:
        choices = [] if delta is None else [{"index": 0, "delta": delta, "logprobs": None, "finish_reason": reason}]
        if with_usage:
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
                        if with_usage:
                            yield chunk(None, usage=_usage(event))
        except RequestError as error:
            yield _sse(error.body())
        yield DONE


def _usage(finish: Finish) -> dict:
    prompt, completion = finish.prompt_tokens, finish.completion_tokens
    return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}


def _sse(value: dict) -> str:
    return f"data: {json.dumps(value, allow_nan=False)}\n\n"
