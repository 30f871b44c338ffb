"""Small parts of the server: the store of responses, the pace of a stream, bytes of tokens."""

from __future__ import annotations

import asyncio

import pytest

from lockstep.config.source import DEMO_FOLDER
from lockstep.frontend.outputs import CompletionOutput, Logprob
from lockstep.frontend.tokenizer import load_tokenizer
from lockstep.server.errors import ApiError
from lockstep.server.logprobs import LEAST, LogprobWriter, token_bytes
from lockstep.server.pace import Pace
from lockstep.server.response_store import ResponseStore, Stored
from lockstep.server.text_offsets import TextOffsets


def stored(name: str, size: int = 1) -> Stored:
    return Stored({"id": name}, [], size)


def test_the_store_forgets_the_oldest() -> None:
    store = ResponseStore(most=2, most_bytes=100)
    for name in "abc":
        store.put(stored(name))
    assert len(store) == 2 and "a" not in store and store.get("c").response == {"id": "c"}
    store.put(stored("c", 99))
    store.put(stored("d", 50))
    assert "c" not in store and len(store) == 1
    with pytest.raises(ApiError) as gone:
        store.get("c")
    assert gone.value.status == 404
    assert store.forget("d") and not store.forget("d")


def test_the_store_ends_what_still_runs_when_it_forgets() -> None:
    async def run() -> bool:
        store, task = ResponseStore(most=1), asyncio.create_task(asyncio.sleep(60))
        store.put(Stored({"id": "a"}, [], 1, task))
        store.put(stored("b"))
        await asyncio.wait([task], timeout=5)
        return task.cancelled()

    assert asyncio.run(run())


def test_the_pace_keeps_everything_and_the_end() -> None:
    pace, given = Pace(3), []
    for i in range(8):
        new = CompletionOutput(0, text=str(i), token_ids=[i], finish_reason="length" if i == 7 else None)
        given.append(pace.take(0, new))
    assert [one and one.text for one in given] == ["0", None, None, "123", None, None, "456", "7"]
    assert given[-1] is not None and given[-1].finished


def test_bytes_of_every_token() -> None:
    tokenizer = load_tokenizer(DEMO_FOLDER)
    text = "naïve ☃ \U0001f600 x"
    ids = tokenizer(text)["input_ids"]
    pieces = [token_bytes(tokenizer, i, tokenizer.decode([i])) for i in ids]
    assert b"".join(pieces) == text.encode()


def test_minus_infinity_is_a_number_in_json() -> None:
    writer = LogprobWriter(load_tokenizer(DEMO_FOLDER))
    position = {5: Logprob(-0.5, 1, "a"), 6: Logprob(float("-inf"), 2, "b")}
    assert writer.completion([position], TextOffsets(load_tokenizer(DEMO_FOLDER))).top_logprobs == [{"a": -0.5, "b": LEAST}]
    assert writer.chat([position], 2).content[0].top_logprobs[1].logprob == LEAST
