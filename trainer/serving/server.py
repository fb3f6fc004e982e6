"""uvicorn, but it closes stalled connections, and ends running work when the process is asked to stop."""

import functools
import json
import sys

import uvicorn
from fastapi import FastAPI
from uvicorn.protocols.http.h11_impl import H11Protocol

from . import limits
from .errors import RequestError


class Connection(H11Protocol):
    """
    Closes a connection whose request does not arrive or whose reply is not read. uvicorn would wait forever.

    Args:
        reply_seconds (`float`): Time from a request's headers to the end of its reply.
    """

    def __init__(self, *args, reply_seconds: float, **kwargs):
        super().__init__(*args, **kwargs)
        self._reply_seconds, self._phase, self._since, self._watcher = reply_seconds, None, 0.0, None

    def connection_made(self, transport):
        super().connection_made(transport)
        if len(self.connections) > limits.MAX_CONNECTIONS:
            transport.abort()
            return
        self._watch()

    def connection_lost(self, exc):
        if self._watcher is not None:
            self._watcher.cancel()
        super().connection_lost(exc)

    def _watch(self):
        waiting = self.cycle is None or self.cycle.response_complete
        phase, now = (self.cycle, waiting), self.loop.time()
        if phase != self._phase:
            self._phase, self._since = phase, now
        elif now - self._since > (limits.HEADER_SECONDS if waiting else self._reply_seconds):
            self.transport.abort()
            return
        self._watcher = self.loop.call_later(1, self._watch)

    def send_400_response(self, msg: str):
        """uvicorn's reply to an invalid request, but in the shape of all other errors."""
        body = json.dumps(RequestError(msg).body()).encode()
        head = b"HTTP/1.1 400 Bad Request\r\nContent-Type: application/json\r\nConnection: close\r\nContent-Length: %d"
        self.transport.write(head % len(body) + b"\r\n\r\n" + body)
        self.transport.close()


class Server(uvicorn.Server):
    """
    Args:
        app (`FastAPI`): What `build_app` returned.
        host, port (`str`, `int`): The address to listen on.
        request_timeout (`float`): Seconds a request may take, including its wait in the queue.
        greeting (`str`): Printed together with the address once the server listens.
    """

    def __init__(self, app: FastAPI, host: str, port: int, request_timeout: float, greeting: str):
        reply_seconds = limits.BODY_SECONDS + request_timeout + limits.REPLY_SECONDS
        config = uvicorn.Config(
            app,
            host,
            port,
            http=functools.partial(Connection, reply_seconds=reply_seconds),
            ws="none",
            proxy_headers=False,
            log_level="warning",
            timeout_graceful_shutdown=limits.SHUTDOWN_SECONDS,
        )
        super().__init__(config)
        self.worker, self.greeting = app.state.worker, greeting

    async def startup(self, sockets=None):
        await super().startup(sockets)
        host, port = self.servers[0].sockets[0].getsockname()[:2]
        sys.stdout.write(f"{self.greeting} at http://{f'[{host}]' if ':' in host else host}:{port}/v1\n")
        sys.stdout.flush()

    async def shutdown(self, sockets=None):
        self.worker.close()
        await super().shutdown(sockets)
