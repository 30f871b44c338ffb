"""What an API process gives its callers: the outputs of a job as an async stream, and the errors of the engine."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator
from contextvars import ContextVar

from lockstep.executor.contract import ExecutorError
from lockstep.frontend.outputs import RequestOutput

# Where it is set, the names of jobs are noted there as they are submitted: for whoever may have to abort what a task started.
submitted: ContextVar[list[str] | None] = ContextVar("submitted", default=None)


SHUTTING_DOWN = "the server is shutting down."  # what streams end with that are cut off by that, and by nothing that broke


class EngineDeadError(ExecutorError):
    """The engine runs no more: no request can be taken."""


class CallRefused(RuntimeError):
    """A call of the engine failed; the engine runs on."""


class CallLate(TimeoutError):
    """A call of the engine got no answer in time."""


class Stream:
    """The outputs of one job, as they come. Ends after the one that is `finished`."""

    def __init__(self) -> None:  # one reader, no limit: a deque and a future take half the time of a queue
        self._came: deque[RequestOutput] = deque()
        self._waiting: asyncio.Future[None] | None = None

    def put(self, output: RequestOutput) -> None:
        self._came.append(output)
        if self._waiting is not None and not self._waiting.done():
            self._waiting.set_result(None)

    async def __aiter__(self) -> AsyncIterator[RequestOutput]:
        loop = asyncio.get_running_loop()
        while True:
            while not self._came:
                self._waiting = loop.create_future()
                await self._waiting
            output = self._came.popleft()
            yield output
            if output.finished:
                return
