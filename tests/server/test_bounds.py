"""What a request may cost: tokenizing without running, giant numbers, responses in the background, vectors that nobody waits for."""

from __future__ import annotations

import asyncio
import threading
import time
from typing import Any

import httpx
import pytest

from lockstep.frontend.streams import CallLate, CallRefused
from lockstep.server.admission_cost import characters_of
from lockstep.server.aside import Aside
from lockstep.server.errors import ApiError
from lockstep.server.state import ServerState
from tests.server.scripted import Scripted

GIANT = 10**30


def run(work: Any) -> Any:
    return asyncio.run(asyncio.wait_for(work, 60))


def client_of(scripted: Scripted) -> httpx.AsyncClient:
    transport = httpx.ASGITransport(scripted.app, raise_app_exceptions=False)
    return httpx.AsyncClient(transport=transport, base_url="http://test", timeout=30)


def state_of(scripted: Scripted) -> ServerState:
    found: ServerState = scripted.app.state.server
    return found


# --- tokens ---


@pytest.fixture(scope="module")
def small() -> Scripted:
    return Scripted("x", max_tokenize_characters=400)


@pytest.mark.parametrize(
    "body",
    [
        {"prompt": "x" * 401},
        {"messages": [{"role": "user", "content": "x" * 401}]},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "x" * 401}]}]},
        {"messages": [{"role": "user", "content": "x"}], "documents": [{"x" * 401: ""}]},
        {"messages": [{"role": "user", "content": "x"}], "chat_template_kwargs": {"a": ["x" * 401]}},
        {"messages": [{"role": "user", "content": "x"}], "tools": [{"function": {"name": "f", "description": "x" * 401}}]},
    ],
)
def test_a_text_that_is_too_long_is_not_tokenized(small: Scripted, body: dict[str, Any]) -> None:
    answer = small.post("/tokenize", **body)
    assert answer.status_code == 400 and "max_tokenize_characters=400" in answer.json()["error"]["message"], answer.text


def test_what_is_within_the_bound_is_tokenized(small: Scripted) -> None:
    assert small.post("/tokenize", prompt="x " * 200, return_token_strs=True).json()["count"] > 0
    assert small.post("/detokenize", tokens=[5] * 100).status_code == 200
    assert small.post("/detokenize", tokens=[5] * 101).json()["error"]["param"] == "tokens"


def test_long_texts_and_many_ids_are_read_beside_the_event_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    scripted = Scripted("x")
    where: list[str] = []
    state, do = state_of(scripted), state_of(scripted).aside.do

    async def noted(work: Any) -> Any:
        return await do(lambda: (where.append(threading.current_thread().name), work())[1])

    monkeypatch.setattr(state.aside, "do", noted)
    ids = scripted.post("/tokenize", prompt="def f(a): " * 2500).json()["tokens"]
    assert scripted.post("/detokenize", tokens=ids).json()["prompt"].endswith("def f(a): ")
    assert len(where) == 2 and all(name.startswith("texts") for name in where)


def test_work_beside_has_an_end_and_a_bounded_queue() -> None:
    async def walk() -> None:
        aside, free = Aside(threads=1, most=2, limit_s=0.3), threading.Event()
        slow = [asyncio.create_task(aside.do(lambda: free.wait(20))) for _ in range(2)]
        await asyncio.sleep(0)
        with pytest.raises(ApiError) as full:
            await aside.do(lambda: 1)
        assert full.value.status == 429 and full.value.headers["retry-after"]
        for task in slow:
            with pytest.raises(ApiError) as late:
                await task
            assert late.value.status == 504
        free.set()
        give_up_s = time.monotonic() + 10
        while aside.pending and time.monotonic() < give_up_s:
            await asyncio.sleep(0.01)
        assert aside.pending == 0 and await aside.do(lambda: 7) == 7

    run(walk())


def test_a_prompt_that_is_to_be_cut_is_bounded_too() -> None:
    scripted = Scripted("x", max_tokenize_characters=1000)
    state_of(scripted).most_characters = 100
    assert scripted.post("/v1/completions", prompt="x " * 300, truncate_prompt_tokens=5, max_tokens=2).status_code == 200
    answer = scripted.post("/v1/completions", prompt="x " * 501, truncate_prompt_tokens=5, max_tokens=2)
    assert answer.status_code == 400 and "max_tokenize_characters=1000" in answer.json()["error"]["message"]
    assert scripted.post("/v1/completions", prompt="x " * 51, max_tokens=2).status_code == 400


def test_characters_of_every_place_where_text_may_stand() -> None:
    numbers = {"tools": [{"function": {"parameters": {"": [1, None, "ab", [2.5]]}}}]}
    assert characters_of(numbers) == len("parameters") + 2 + 2 + 1
    assert characters_of({"prompt": [1] * 9, "input": [[1] * 9]}) == 0  # token ids are no text
    assert characters_of({"text": "abc"}) == characters_of({"text": ["ab", "abc"]}) == 3
    assert characters_of({"input": [{"role": "", "content": "abc"}, {"content": "de"}], "instructions": "x"}) == 6
    assert characters_of({"messages": [{"content": "", "tool_calls": [{"function": {"name": "f", "arguments": {"k": "vv"}}}]}]}) == 4
    assert characters_of({"prompt": "ab", "tools": [{"type": "", "function": {"parameters": {"x": ""}}}]}) == 2 + len("parameters") + 1


# --- giant numbers ---


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions", "/v1/responses", "/v1/embeddings", "/generate"])
@pytest.mark.parametrize("name", ["priority", "seed", "max_tokens", "timeout", "top_k", "stop_token_ids", "dimensions", "response_format"])
def test_giant_whole_numbers_are_refused_anywhere(path: str, name: str) -> None:
    value: Any = [GIANT] if name == "stop_token_ids" else {"type": "json_schema", "json_schema": {"schema": {"maximum": GIANT}}}
    value = value if name in ("stop_token_ids", "response_format") else GIANT
    body = {"prompt": "x", "input": "x", "text": "x", "messages": [{"role": "user", "content": "x"}]}
    if path == "/v1/responses":
        del body["text"]
    answer = Giant.scripted().post(path, **body, **{name: value})
    assert answer.status_code == 400 and answer.json()["error"]["param"] == name, answer.text


class Giant:
    _made: Scripted | None = None

    @classmethod
    def scripted(cls) -> Scripted:
        """One application for all cases: a refusal leaves nothing behind."""
        cls._made = cls._made or Scripted("x")
        return cls._made


@pytest.mark.parametrize(
    "body", [{"model": 5}, {"model": "m" * 300}, {"priority": 2**63}, {"priority": "1"}, {"user": 7}, {"normalize": 1}]
)
def test_fields_of_embeddings_are_as_strict_as_all_others(body: dict[str, Any]) -> None:
    answer = Giant.scripted().post("/v1/embeddings", input="x", **body)
    assert answer.status_code == 400 and answer.json()["error"]["param"] == next(iter(body)), answer.text


# --- who goes on after the response, and who does not ---

BACKGROUND = {"input": "x", "background": True, "store": True}


def test_a_response_in_the_background_keeps_its_place_until_it_ends() -> None:
    scripted = Scripted("x", hangs=True, max_num_queued_reqs=0)
    state = state_of(scripted)

    async def walk() -> None:
        async with client_of(scripted) as client:
            room = state.admission.bounds.running
            names = [(await client.post("/v1/responses", json=BACKGROUND)).json()["id"] for _ in range(room)]
            assert state.admission.requests == len(state.running) == room
            assert (await client.post("/v1/responses", json=BACKGROUND)).status_code == 429
            ended = await client.post(f"/v1/responses/{names[0]}/cancel")
            assert ended.json()["status"] == "cancelled" and state.admission.requests == len(state.running) == room - 1
            for name in names[1:]:
                await client.delete(f"/v1/responses/{name}")
            await asyncio.sleep(0.05)
            assert not state.running and not state.admission.requests

    run(walk())


def test_a_response_in_the_background_has_a_deadline_and_is_drained() -> None:
    scripted = Scripted("x", hangs=True)
    state = state_of(scripted)

    async def walk() -> None:
        async with client_of(scripted) as client:
            late = (await client.post("/v1/responses", json=BACKGROUND | {"timeout": 2.0})).json()["id"]
            drained = (await client.post("/v1/responses", json=BACKGROUND)).json()["id"]
            give_up_s = time.monotonic() + 20
            while (found := (await client.get(f"/v1/responses/{late}")).json())["status"] != "failed":
                assert time.monotonic() < give_up_s, found
                await asyncio.sleep(0.05)
            assert found["error"]["code"] == "deadline_exceeded"
            while len(state.running) > 1:  # what has failed is told before it has left
                assert time.monotonic() < give_up_s, state.running
                await asyncio.sleep(0.05)
            (running,) = state.running
            running.stop(ApiError(503, "the end", code="draining"))
            await asyncio.sleep(0.05)
            found = (await client.get(f"/v1/responses/{drained}")).json()
            assert (found["status"], found["error"]["code"]) == ("failed", "draining")
            assert not state.running and not state.admission.requests and len(scripted.engine.aborted) >= 2

    run(walk())


def test_vectors_that_nobody_waits_for_are_not_made() -> None:
    scripted = Scripted("x", hangs=True)

    async def walk() -> None:
        news: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
        news.put_nowait({"type": "http.request", "body": b'{"input": "x"}', "more_body": False})
        scope = {"type": "http", "method": "POST", "path": "/v1/embeddings", "raw_path": b"/v1/embeddings", "query_string": b""}
        scope |= {"headers": [(b"content-type", b"application/json")], "client": ("c", 1), "server": ("s", 1), "scheme": "http"}

        async def send(message: Any) -> None:
            raise AssertionError("nobody is there")

        call = asyncio.create_task(scripted.app({**scope, "root_path": "", "http_version": "1.1", "extensions": {}}, news.get, send))
        while not scripted.engine.jobs:
            await asyncio.sleep(0.01)
        await asyncio.sleep(0.05)
        assert not scripted.engine.aborted
        news.put_nowait({"type": "http.disconnect"})
        while not scripted.engine.aborted:
            await asyncio.sleep(0.01)
        call.cancel()

    run(walk())


# --- an engine that does not answer ---


@pytest.mark.parametrize("error", [CallRefused("it is started again"), CallLate("no answer in 10 s")])
@pytest.mark.parametrize("path", ["/metrics", "/v1/cluster", "/is_paused", "/v1/requests"])
def test_a_call_that_fails_is_503_and_says_when_to_come_back(path: str, error: Exception) -> None:
    scripted = Scripted("x")

    async def call(*args: Any, **options: Any) -> Any:
        raise error

    scripted.engine.call = call  # type: ignore[attr-defined]

    async def walk() -> None:
        async with client_of(scripted) as client:
            answer = await client.get(path)
            assert answer.status_code == 503 and answer.headers["retry-after"]
            assert answer.json()["error"]["message"] == str(error)

    run(walk())


def test_the_servers_info_asks_nobody() -> None:
    scripted = Scripted("x")
    scripted.engine.health = None  # type: ignore[attr-defined]

    async def walk() -> None:
        async with client_of(scripted) as client:
            answer = await client.get("/server_info")
            assert answer.status_code == 200 and answer.json()["stats"] is None

    run(walk())
