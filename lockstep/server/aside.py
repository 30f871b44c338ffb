"""Long work on text beside the event loop: a few threads, a bounded queue before them, and a time limit.

A tokenizer cannot be interrupted: work that is given up ends by itself, and keeps its place until then. So what is handed in has
to be bounded too.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

from lockstep.server.errors import ApiError

THREADS = 2
MOST = 64  # pieces of work, under way and waiting
LIMIT_S = 30.0
AGAIN_S = 5  # when to come back
T = TypeVar("T")


class Aside:
    """One per API process. Its threads start when they are needed."""

    def __init__(self, threads: int = THREADS, most: int = MOST, limit_s: float = LIMIT_S) -> None:
        self._pool = ThreadPoolExecutor(threads, "texts")
        self._most, self._limit_s = most, limit_s
        self.pending = 0

    async def do(self, work: Callable[[], T]) -> T:
        """What `work` returns or raises. Raises ApiError 429 when too much waits already, 504 when it takes too long."""
        if self.pending >= self._most:
            message = f"{self.pending} texts wait to be read already, as many as may: try again in {AGAIN_S} s."
            raise ApiError(429, message, code="queue_full", headers={"retry-after": str(AGAIN_S)})
        self.pending += 1
        loop, future = asyncio.get_running_loop(), self._pool.submit(work)
        future.add_done_callback(lambda done: _tell(loop, self._done, done))
        try:
            return await asyncio.wait_for(asyncio.wrap_future(future), self._limit_s)
        except TimeoutError:
            message = f"the text was not read in {self._limit_s:g} s, the limit: send less at once."
            raise ApiError(504, message, code="deadline_exceeded") from None

    def _done(self) -> None:
        self.pending -= 1


def _tell(loop: asyncio.AbstractEventLoop, call: Callable[[], None], done: Future[Any]) -> None:
    if not loop.is_closed():
        loop.call_soon_threadsafe(call)
