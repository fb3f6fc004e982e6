"""One thread that answers requests one by one, a bounded queue in front of it, and jobs that end when nobody waits."""

import asyncio
import threading
import time
from collections import deque
from collections.abc import Callable
from logging import getLogger

from .errors import RequestError, busy, internal

logger = getLogger(__name__)


class Job:
    """
    The work for one request, and the events that it sends to the request's handler.

    The event loop creates, reads and cancels it; the worker's thread runs it.

    Args:
        work (`Callable[[Job], None]`): Runs in the worker's thread, calls `send`, and returns soon after `ended`.
        seconds (`float`): Time limit, including the wait in the queue.
    """

    def __init__(self, work: Callable[["Job"], None], seconds: float):
        self.work, self.deadline = work, time.monotonic() + seconds
        self.loop, self.events = asyncio.get_running_loop(), asyncio.Queue()
        self.cancelled = False

    @property
    def expired(self) -> bool:
        return time.monotonic() >= self.deadline

    @property
    def ended(self) -> bool:
        """Whether nobody is waiting any more, or the time is up."""
        return self.cancelled or self.expired

    def send(self, event):
        """Passes an event to the request's handler; `None` is the last one. Called in the worker's thread."""
        if not self.loop.is_closed():
            self.loop.call_soon_threadsafe(self.events.put_nowait, event)

    async def next(self):
        """
        The next event, `None` after the last one.

        Raises:
            `RequestError`: The work failed or was cancelled.
        """
        event = await self.events.get()
        if isinstance(event, RequestError):
            raise event
        return event

    def cancel(self, error: RequestError | None = None):
        self.cancelled = True
        self.events.put_nowait(error or busy("The request was cancelled."))

    def run(self):
        try:
            if self.expired:
                raise busy("The server was busy for as long as a request may take. Try again in a while.")
            self.work(self)
            self.send(None)
        except RequestError as error:
            self.send(error)
        except Exception:
            logger.exception("A request failed.")
            self.send(internal())
        finally:
            self.work = None  # frees the request: a client that reads slowly keeps the job alive


class Worker:
    """
    Runs jobs in one thread, one after the other.

    Args:
        max_waiting (`int`): Jobs that can wait in the queue; further ones are refused.

    Attributes:
        waiting (`deque[Job]`): The queue.
        running (`Job`, *optional*): The job that the thread is working on.
    """

    def __init__(self, max_waiting: int):
        self.max_waiting = max_waiting
        self.waiting, self.running, self._changed = deque(), None, threading.Condition()
        self._closed = False
        # A daemon thread, because a prefill cannot be interrupted and must not keep the process alive.
        threading.Thread(target=self._work, daemon=True, name="safevlm-worker").start()

    def submit(self, job: Job):
        """
        Raises:
            `RequestError`: The queue is full or the server is shutting down (503).
        """
        with self._changed:
            if self._closed:
                raise busy("The server is shutting down.")
            self.waiting = deque(other for other in self.waiting if not other.cancelled)
            if len(self.waiting) >= self.max_waiting:
                raise busy(f"{self.max_waiting} requests are waiting already. Try again in a while.")
            self.waiting.append(job)
            self._changed.notify()

    def close(self):
        """Cancels all jobs and accepts no more. Called in the event loop."""
        with self._changed:
            self._closed = True
            jobs = [*self.waiting, self.running] if self.running else [*self.waiting]
            self.waiting.clear()
        for job in jobs:
            job.cancel(busy("The server is shutting down."))

    def _work(self):
        while True:
            with self._changed:
                self.running = None
                self._changed.wait_for(lambda: self.waiting)
                job = self.running = self.waiting.popleft()
            if not job.cancelled:
                job.run()
            del job  # frees the request's pictures before the next job arrives
