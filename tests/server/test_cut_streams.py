"""Streams that end early: cut off by the server with the error that the same request has without a stream, or by a client."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from typing import Any

import httpx
import pytest

from lockstep.server.errors import ApiError
from lockstep.server.state import ServerState
from tests.server.scripted import Scripted

HI = [{"role": "user", "content": "hi"}]
BODIES: dict[str, dict[str, Any]] = {
    "/v1/completions": {"prompt": "x", "max_tokens": 50},
    "/v1/chat/completions": {"messages": HI},
    "/generate": {"text": "x"},
}
CUTS = {"deadline_exceeded": 504, "draining": 503}


def cut(scripted: Scripted, path: str, code: str, **body: Any) -> httpx.Response:
    """The answer to a request that never ends by itself, and is cut off."""
    state: ServerState = scripted.app.state.server

    def drain() -> None:
        for running in list(state.running):
            running.stop(ApiError(CUTS[code], "the end", code=code))

    return early(scripted, path, drain if code == "draining" else None, **body | ({} if code == "draining" else {"timeout": 0.3}))


def early(scripted: Scripted, path: str, then: Callable[[], Any] | None, **body: Any) -> httpx.Response:
    """The answer to a request. then: what is done while it runs."""

    asked = len(scripted.engine.jobs)

    async def call() -> httpx.Response:
        transport = httpx.ASGITransport(scripted.app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://test", timeout=30) as client:
            asking = asyncio.create_task(client.post(path, json=body))
            while not scripted.engine.jobs[asked:] and not asking.done():  # a machine with other work takes its time
                await asyncio.sleep(0.01)
            await asyncio.sleep(0.2)
            found = then() if then is not None else None
            if asyncio.iscoroutine(found):
                await found
            return await asking

    answer = asyncio.run(asyncio.wait_for(call(), 30))
    state: ServerState = scripted.app.state.server
    assert not state.running and state.admission.requests == 0, "a request ends once, and then it has ended"
    return answer


@pytest.mark.parametrize("code", CUTS)
@pytest.mark.parametrize("path", BODIES)
def test_a_stream_that_the_server_cuts_off_ends_with_the_error_that_it_is(path: str, code: str) -> None:
    scripted = Scripted("def f(): pass", hangs=True)
    assert cut(scripted, path, code, **BODIES[path]).json()["error"]["code"] == code
    answer = cut(scripted, path, code, **BODIES[path], stream=True)
    assert answer.status_code == 200
    *chunks, last, done, end = answer.text.split("\n\n")
    assert (done, end) == ("data: [DONE]", "") and chunks, "what was written before has been told"
    assert json.loads(last.removeprefix("data: "))["error"]["code"] == code
    assert "abort" not in answer.text


def test_what_was_held_back_for_a_stop_string_is_told_when_the_server_cuts_off() -> None:
    body = BODIES["/v1/completions"] | {"stop": ["pass on"], "stream": True, "stream_options": {"include_usage": True}}
    answer = cut(Scripted("def f(): pass", hangs=True), "/v1/completions", "deadline_exceeded", **body)
    chunks = [json.loads(line[6:]) for line in answer.text.splitlines() if line.startswith("data: {")]
    assert "".join(one["text"] for chunk in chunks[:-1] for one in chunk["choices"]) == "def f(): pass" and "error" in chunks[-1]


@pytest.mark.parametrize("more", [{"n": 3}, {"prompt": ["x", "y"]}, {"prompt": ["x", "y"], "n": 2, "stream_interval": 4}])
def test_of_several_choices_there_is_one_error(more: dict[str, Any]) -> None:
    answer = cut(Scripted("def f(): pass", hangs=True), "/v1/completions", "deadline_exceeded", **{"prompt": "x"} | more, stream=True)
    assert answer.text.count('"error"') == 1 and "abort" not in answer.text and answer.text.endswith("}\n\ndata: [DONE]\n\n")


@pytest.mark.parametrize("code", CUTS)
def test_a_response_that_the_server_cuts_off_has_failed(code: str) -> None:
    scripted = Scripted("def f(): pass", hangs=True)
    assert cut(scripted, "/v1/responses", code, input="x").json()["error"]["code"] == code
    answer = cut(scripted, "/v1/responses", code, input="x", stream=True, store=True)
    events = [json.loads(line[6:]) for line in answer.text.splitlines() if line.startswith("data: ")]
    assert events[-1]["type"] == "response.failed" and [e["sequence_number"] for e in events] == list(range(len(events)))
    response = events[-1]["response"]
    assert (response["status"], response["error"]["code"], response["incomplete_details"]) == ("failed", code, None)
    assert scripted.app.state.server.responses.get(response["id"]).response["status"] == "failed"


def test_a_stream_that_a_client_ends_says_abort() -> None:
    scripted = Scripted("def f(): pass", hangs=True)
    answer = early(scripted, "/v1/completions", lambda: scripted.engine.abort(["0"]), prompt="x", max_tokens=50, stream=True)
    assert '"finish_reason":"abort"' in answer.text and '"error"' not in answer.text and answer.text.endswith("data: [DONE]\n\n")
