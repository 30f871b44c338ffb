"""A streamed answer: what goes through the middleware, what past it, and what happens when it is cut off."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest

from lockstep.server.sse import DIRECT, DONE, EventStream, event


async def receive() -> dict[str, str]:
    await asyncio.sleep(3600)
    return {"type": "http.disconnect"}


class Heard:
    """What was sent, in order, and through which `send`."""

    def __init__(self) -> None:
        self.said: list[tuple[str, object]] = []
        self.aborted = 0

    async def wrapped(self, message: dict[str, object]) -> None:
        self.said.append(("wrapped", message.get("body", "start")))

    async def direct(self, message: dict[str, object]) -> None:
        self.said.append(("direct", message.get("body", "start")))

    async def abort(self) -> None:
        self.aborted += 1


async def two() -> AsyncIterator[bytes]:
    yield event(1)
    yield event(2)


def test_the_middleware_sees_how_it_begins_and_ends_and_tokens_go_past_it():
    heard = Heard()
    asyncio.run(EventStream(two(), heard.abort)({"type": "http", DIRECT: heard.direct}, receive, heard.wrapped))
    assert heard.said == [("wrapped", "start"), ("direct", event(1)), ("direct", event(2)), ("wrapped", DONE)]
    assert heard.aborted == 1


def test_without_a_direct_way_all_goes_through_it():
    heard = Heard()
    asyncio.run(EventStream(two(), heard.abort)({"type": "http"}, receive, heard.wrapped))
    assert [way for way, _ in heard.said] == ["wrapped"] * 4


def test_an_error_in_the_middle_is_an_event_and_the_end_follows():
    async def broken() -> AsyncIterator[bytes]:
        yield event(1)
        raise RuntimeError("the events cannot go on")

    heard = Heard()
    asyncio.run(EventStream(broken(), heard.abort)({"type": "http", DIRECT: heard.direct}, receive, heard.wrapped))
    bodies = [body for _, body in heard.said]
    assert bodies[1] == event(1) and b'"error"' in bodies[2] and bodies[3] == DONE and heard.aborted == 1


def test_a_deadline_around_it_stops_what_makes_the_events():
    closed: list[bool] = []

    async def endless() -> AsyncIterator[bytes]:
        try:
            yield event(1)
            await asyncio.sleep(3600)
        finally:
            closed.append(True)

    async def run() -> None:
        heard = Heard()
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.05):
                await EventStream(endless(), heard.abort)({"type": "http", DIRECT: heard.direct}, receive, heard.wrapped)
        assert closed == [True] and heard.aborted == 1
        await asyncio.sleep(0)  # the watcher has been told to end
        assert len(asyncio.all_tasks()) == 1, "a task is left behind"

    asyncio.run(run())
