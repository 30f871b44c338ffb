"""What an API process gives its callers: the outputs of a job as an async stream, and the errors of the engine."""

from __future__ import annotations

import asyncio
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

    def __init__(self) -> None:
        self._queue: asyncio.Queue[RequestOutput] = asyncio.Queue()

    def put(self, output: RequestOutput) -> None:
        self._queue.put_nowait(output)

    async def __aiter__(self) -> AsyncIterator[RequestOutput]:
        while True:
            output = await self._queue.get()
            yield output
            if output.finished:
                return
