"""HTTP in one process, from the engine's first word to the last response: serving, the drain, the two ways to end early.

first SIGTERM or SIGINT   readiness says 503, new requests that generate are refused, those under way finish, up to
                          shutdown_timeout; what is left then ends with an error; exit code 0
second                    the end, now; exit code 128 + its number
the engine is gone        every request ends with its error, then ExecutorError
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Callable, Coroutine
from typing import Any, NamedTuple

import uvloop

from lockstep.executor.contract import ExecutorError
from lockstep.frontend.async_engine import AsyncEngine
from lockstep.observability.logging import get_logger
from lockstep.protocol.health import PULSE_S
from lockstep.server.app import create_app
from lockstep.server.errors import ApiError
from lockstep.server.launch_http import Server, make_server
from lockstep.server.middleware_gate import AGAIN_S, GRACE_S
from lockstep.server.state import ServerState
from lockstep.utils.collection import rare_collections
from lockstep.utils.interrupt import heard
from lockstep.utils.switching import short_switches
from lockstep.utils.words import counted

POLL_S = 0.05
Failure = Callable[[], Exception | None]  # why the engine's process runs no more; None while it does


class Steps(NamedTuple):
    """What is done along the way. before, ready: the engine is connected; before the first connection is taken, and after.

    turned: the event loop turns, said every `PULSE_S` seconds. rest: it will no more.
    """

    before: Callable[[], None] = lambda: None
    ready: Callable[[], None] = lambda: None
    turned: Callable[[], None] = lambda: None
    rest: Callable[[], None] = lambda: None


_log = get_logger(__name__)


def run_serving(
    state: ServerState,
    failure: Failure,
    listener: socket.socket,
    steps: Steps,
    connect_s: float = 30.0,
) -> int:
    """Serve until a signal comes or the engine is gone; the exit code. Raises ExecutorError for the latter.

    failure: why the engine's process runs no more, None while it does. steps: towards serving.
    connect_s: how long that may take: the engine may just be starting anew.
    """
    with rare_collections(), short_switches(), asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(turning(Serving(state, failure, listener).run(steps, connect_s), steps))


async def turning(work: Coroutine[Any, Any, int], steps: Steps) -> int:
    """Do the work, and have it known meanwhile that the event loop turns."""

    async def turn() -> None:
        while True:
            steps.turned()
            await asyncio.sleep(PULSE_S)

    turns = asyncio.create_task(turn(), name="turns")
    try:
        return await work
    finally:
        turns.cancel()
        steps.rest()


async def connect(engine: AsyncEngine, limit_s: float, failure: Failure, stopped: Callable[[], bool]) -> bool:
    """Until the engine answers; False when it was stopped first. Raises ExecutorError when there is none, or none in time.

    Unless this returns True, the engine is closed.
    """
    connecting = asyncio.create_task(engine.connect(limit_s), name="connect")
    try:
        while not connecting.done():
            await asyncio.wait([connecting], timeout=POLL_S)
            found = None if connecting.done() else failure()
            if found is not None:
                raise ExecutorError(str(found))
            if stopped() and not connecting.done():
                await _leave(engine, connecting)
                return False
        connecting.result()
    except BaseException:
        await _leave(engine, connecting)
        raise
    return True


async def _leave(engine: AsyncEngine, connecting: asyncio.Task[None]) -> None:
    connecting.cancel()
    await asyncio.wait([connecting])
    await engine.close()


async def until_dead(engine: AsyncEngine, failure: Failure) -> None:
    """Returns when the engine is gone for good: `engine.failure` says why, and every job has ended with it."""
    while engine.failure is None:
        await asyncio.sleep(POLL_S)
        found = failure()
        if found is not None:
            engine.fail(str(found))


class Serving:
    """One process's HTTP and its end."""

    def __init__(self, state: ServerState, failure: Failure, listener: socket.socket) -> None:
        self._state, self._failure, self._listener = state, failure, listener
        self._server: Server = make_server(create_app(state), state.options)
        self._signals: list[int] = []
        self._first, self._second = asyncio.Event(), asyncio.Event()

    async def run(self, steps: Steps, connect_s: float) -> int:
        loop = asyncio.get_running_loop()
        for number in heard():
            loop.add_signal_handler(number, self._signal, number)
        if not await connect(self._state.engine, connect_s, self._failure, lambda: bool(self._signals)):
            return 128 + self._signals[1] if len(self._signals) > 1 else 0
        steps.before()
        serving = asyncio.create_task(self._server.serve(sockets=[self._listener]), name="http")
        steps.ready()
        helpers = [asyncio.create_task(self._watch()), asyncio.create_task(self._drain()), asyncio.create_task(self._at_once(serving))]
        try:
            await asyncio.wait([serving])
            if not serving.cancelled():
                serving.result()
        finally:
            for helper in helpers:
                helper.cancel()
        failure = self._state.engine.failure
        await self._state.engine.close()
        if failure is not None:
            raise ExecutorError(str(failure))
        return 128 + self._signals[1] if len(self._signals) > 1 else 0

    def _signal(self, number: int) -> None:
        self._signals.append(number)
        (self._first if len(self._signals) == 1 else self._second).set()

    async def _watch(self) -> None:
        """The engine's end is the server's, once every request has been answered."""
        engine = self._state.engine
        await until_dead(engine, self._failure)
        _log.error("the engine is gone, and so is this server: %s", engine.failure)
        self._state.draining = True
        await self._empty(GRACE_S)
        self._server.should_exit = True

    async def _drain(self) -> None:
        await self._first.wait()
        state = self._state
        state.draining = True
        limit_s = state.options.shutdown_timeout
        if count := len(state.running):
            have = f"{counted(count, 'request')} {'has' if count == 1 else 'have'}"
            _log.warning("shutting down: %s %g s to finish; a second signal ends %s at once", have, limit_s, "it" if count == 1 else "them")
        else:
            _log.warning("shutting down: no request is under way")
        if not await self._empty(limit_s):
            late = ApiError(
                503,
                f"the server is shutting down, and the request was not done in {limit_s:g} s (shutdown_timeout): send it to another one.",
                code="draining",
                headers={"retry-after": str(AGAIN_S), "connection": "close"},
            )
            for running in list(state.running):
                running.stop(late)
            await self._empty(GRACE_S)
        self._server.should_exit = True

    async def _empty(self, limit_s: float) -> bool:
        """Wait until nothing runs; whether that was in time."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(limit_s):
                while self._state.running:
                    await asyncio.sleep(POLL_S)
        return not self._state.running

    async def _at_once(self, serving: asyncio.Task[None]) -> None:
        await self._second.wait()
        self._server.force_exit = True
        serving.cancel()
