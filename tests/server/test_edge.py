"""Between the socket and the routes: keys, ids, bodies, admission, deadlines, the drain."""

from __future__ import annotations

import asyncio
import json
import logging
import re
import warnings
from typing import Any

import httpx
import pytest
from starlette.routing import Mount, Route

from lockstep.observability import logging as ours
from lockstep.server.admission import Cost
from lockstep.server.app import create_app
from lockstep.server.errors import ApiError
from lockstep.server.middleware import OPEN_FOLDERS, OPEN_PATHS
from tests.server.edge_app import BUSY, EdgeEngine, client_of, make_app, make_state

KEY = {"Authorization": "Bearer sk-right"}


def run(work: Any) -> Any:
    return asyncio.run(asyncio.wait_for(work, 60))


def routes_of(app: Any) -> list[tuple[str, str]]:
    """(method, path) of every route there is, parameters filled in."""
    found = []
    for route in app.routes:
        if hasattr(route, "original_router"):
            found += routes_of(route.original_router)
        elif isinstance(route, Mount):
            found.append(("GET", route.path + "/x"))
        else:
            assert isinstance(route, Route), f"{route!r} would be left out"
            found += [(method, re.sub(r"\{.*?\}", "m", route.path)) for method in route.methods or ()]
    return found


def test_without_a_key_every_route_but_the_open_ones_answers_401() -> None:
    async def walk() -> None:
        app = create_app(make_state(api_key=["sk-right"]))
        routes = routes_of(app)
        closed = [(m, p) for m, p in routes if not (m in ("GET", "HEAD") and (p in OPEN_PATHS or p.startswith(OPEN_FOLDERS)))]
        assert {("GET", "/openapi.json"), ("GET", "/docs"), ("GET", "/v1/models"), ("POST", "/v1/completions")} <= set(closed)
        async with client_of(app) as client:
            for method, path in [
                *closed,
                ("POST", "/health"),
                ("GET", "/nowhere"),
                ("GET", "/%2Flivez"),
                ("GET", "/livez/"),
                ("GET", "/web"),
            ]:
                for headers in (
                    {},
                    {"Authorization": "Bearer sk-wrong"},
                    {"Authorization": "sk-right"},
                    {"Authorization": "Basic sk-right"},
                ):
                    answer = await client.request(method, path, headers=headers)
                    assert answer.status_code == 401, (method, path, headers)
                    assert answer.headers["www-authenticate"] == "Bearer"
                    if method != "HEAD":
                        assert answer.json()["error"]["code"] == "invalid_api_key"

    run(walk())


def test_any_of_the_keys_lets_in_and_open_paths_need_none() -> None:
    async def walk() -> None:
        app = make_app(make_state(api_key=["sk-other", "sk-right"]))
        async with client_of(app) as client:
            assert (await client.get("/livez")).status_code == 200
            assert (await client.get("/readyz")).status_code == 200
            assert (await client.post("/tokenize", json={})).status_code == 401
            assert (await client.post("/tokenize", json={}, headers=KEY)).status_code == 200
            assert (await client.post("/tokenize", json={}, headers={"Authorization": "bearer sk-other"})).status_code == 200
            twice = httpx.Headers([("Authorization", "Bearer sk-right"), ("Authorization", "Bearer sk-wrong")])
            assert (await client.post("/tokenize", json={}, headers=twice)).status_code == 401

    run(walk())


def test_root_path_opens_no_other_door() -> None:
    async def walk() -> None:
        app = create_app(make_state(api_key=["k"], root_path="/llm"))
        async with client_of(app) as client:
            assert (await client.get("/llm/v1/models")).status_code == 401
            assert (await client.get("/llm/docs")).status_code == 401
            assert (await client.get("/llm/llm/livez")).status_code == 401
            allowed = await client.get("/llm/version", headers={"Authorization": "Bearer k"})
            assert allowed.status_code == 200

    run(walk())


def test_root_path_is_described_without_a_warning() -> None:
    async def walk() -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            app = create_app(make_state(root_path="/llm"))
            async with client_of(app) as client:
                for path in ("/openapi.json", "/llm/openapi.json"):
                    assert (await client.get(path)).json()["servers"] == [{"url": "/llm"}]
                assert (await client.get("/llm/docs")).status_code == 200

    run(walk())


def test_request_ids_come_back_and_are_made() -> None:
    async def walk() -> None:
        app = make_app(make_state(api_key=["sk-right"]))
        async with client_of(app) as client:
            assert (await client.get("/livez", headers={"X-Request-Id": "abc-1"})).headers["x-request-id"] == "abc-1"
            refused = await client.get("/nowhere", headers={"X-Request-Id": "abc-2"})
            assert (refused.status_code, refused.headers["x-request-id"]) == (401, "abc-2")
            for bad in ("x" * 129, "a b", 'a"b', "a\tb"):
                assert len((await client.get("/livez", headers={"X-Request-Id": bad})).headers["x-request-id"]) == 32
            first, second = [(await client.get("/livez")).headers["x-request-id"] for _ in range(2)]
            assert first != second

    run(walk())


def test_json_log_lines_have_the_request_and_neither_keys_nor_prompts(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LOCKSTEP_LOG_FORMAT", "json")
    ours.configure("info")

    async def walk() -> None:
        app = make_app(make_state(api_key=["sk-right"]))
        async with client_of(app, **KEY, **{"X-Request-Id": "abc-3"}) as client:
            await client.post("/v1/completions?prompt=in-the-query", json={"do": "raise", "prompt": "tell nobody"})
            await client.get("/no%0Asuch%22path")

    try:
        run(walk())
    finally:
        monkeypatch.delenv("LOCKSTEP_LOG_FORMAT")
        logging.getLogger("lockstep").handlers.clear()
        logging.getLogger("lockstep").propagate = True
    said = capsys.readouterr().err
    lines = [json.loads(line) for line in said.splitlines()]
    access = [line for line in lines if line["logger"] == "lockstep.access"]
    assert [(line["status"], line["method"], line["request_id"]) for line in access] == [(500, "POST", "abc-3"), (404, "GET", "abc-3")]
    assert all(line["seconds"] >= 0 for line in access)
    error = next(line for line in lines if line["level"] == "error")
    assert error["request_id"] == "abc-3" and "RuntimeError" in error["exception"]
    assert "sk-right" not in said and "tell nobody" not in said and "in-the-query" not in said


def test_an_exception_of_ours_is_a_500_that_tells_nothing() -> None:
    async def walk() -> None:
        async with client_of(make_app(make_state())) as client:
            answer = await client.post("/v1/completions", json={"do": "raise"})
            assert answer.status_code == 500 and "secret" not in answer.text
            assert answer.json()["error"]["code"] == "internal_error" and answer.headers["x-request-id"]

    run(walk())


def test_cors_is_off_unless_origins_are_named() -> None:
    ask = {"Origin": "https://a.example", "Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization"}

    async def walk() -> None:
        async with client_of(make_app(make_state(api_key=["k"]))) as client:
            answer = await client.options("/v1/completions", headers=ask)
            assert answer.status_code == 401 and "access-control-allow-origin" not in answer.headers
        async with client_of(make_app(make_state(api_key=["k"], allowed_origins=["https://a.example"]))) as client:
            answer = await client.options("/v1/completions", headers=ask)
            assert (answer.status_code, answer.headers["access-control-allow-origin"]) == (200, "https://a.example")
            refused = await client.post("/v1/completions", json={}, headers={"Origin": "https://a.example"})
            assert refused.status_code == 401 and refused.headers["access-control-allow-origin"] == "https://a.example"
            other = await client.post("/v1/completions", json={}, headers={"Origin": "https://b.example"})
            assert "access-control-allow-origin" not in other.headers

    run(walk())


def test_a_browsers_openai_client_may_send_its_headers() -> None:
    sent = "authorization, content-type, x-stainless-lang, x-stainless-package-version, x-stainless-os, x-stainless-arch, "
    sent += "x-stainless-runtime, x-stainless-runtime-version, x-stainless-retry-count, x-stainless-timeout, openai-organization"
    ask = {"Origin": "https://a.example", "Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": sent}

    async def walk() -> None:
        async with client_of(make_app(make_state(allowed_origins=["https://a.example"]))) as client:
            assert (await client.options("/v1/completions", headers=ask)).status_code == 200
            other = {**ask, "Access-Control-Request-Headers": f"{sent}, x-else"}
            assert (await client.options("/v1/completions", headers=other)).status_code == 400
        async with client_of(make_app(make_state(allowed_origins=["https://a.example"], allowed_headers=["X-Else"]))) as client:
            assert (await client.options("/v1/completions", headers=ask)).status_code == 400

    run(walk())


# --- bodies ---


def test_a_body_is_counted_as_it_comes() -> None:
    async def pieces(count: int) -> Any:
        for _ in range(count):
            yield b" " * 100

    async def walk() -> None:
        async with client_of(make_app(make_state(max_body_bytes=1000))) as client:
            assert (await client.post("/tokenize", content=b"1" + b" " * 999)).json() == {"bytes": 1000}
            for body in (b"1" + b" " * 1000, pieces(11)):
                answer = await client.post("/tokenize", content=body)
                assert answer.status_code == 413 and answer.headers["connection"] == "close"
                assert "max_body_bytes=1000" in answer.json()["error"]["message"]

    run(walk())


@pytest.mark.parametrize(
    "body",
    [
        *(b"\xff", b'{"a": "\xff"}', b'{"a": "\xed\xa0\x80"}', b'{"a": "\\ud800"}', b'"\\ud800x"', b"NaN", b'{"a": Infinity}', b"1e999"),
        *(b"{", b"[1,]", b"{'a': 1}", b'{"a": 1} x', b"9" * 5000, b"[" * 100_000, b'{"a":' * 70 + b"1" + b"}" * 70, b"\x00", b'"\x01"'),
        b"\x1f\x8b\x08\x00",
    ],
)
def test_what_is_no_json_is_400(body: bytes) -> None:
    async def walk() -> None:
        async with client_of(make_app(make_state())) as client:
            answer = await client.post("/tokenize", content=body)
            assert answer.status_code == 400 and answer.json()["error"]["type"] == "invalid_request_error"

    run(walk())


# --- the gate ---


def test_a_full_queue_is_429_and_a_place_is_free_again_afterwards() -> None:
    async def walk() -> None:
        state = make_state(EdgeEngine(max_num_seqs=1), max_num_queued_reqs=0)
        app = make_app(state)
        async with client_of(app) as client:
            waiting = asyncio.create_task(client.post("/v1/completions", json=BUSY.wait))
            await app.state.entered.wait()
            full = await client.post("/v1/completions", json=BUSY.echo)
            assert full.status_code == 429 and 1 <= int(full.headers["retry-after"]) <= 60
            assert full.json()["error"]["type"] == "rate_limit_error"
            assert (await client.post("/tokenize", json={})).status_code == 200  # what does not generate, passes
            assert (await client.post("/v1/completions", json={"prompt": ["x"] * 2})).status_code == 400
            await state.engine.abort(["waiting"])
            assert (await waiting).status_code == 200
            assert (await client.post("/v1/completions", json=BUSY.echo)).status_code == 200
        assert state.admission.requests == 0 and not state.running

    run(walk())


def test_places_are_counted_by_key() -> None:
    async def walk() -> None:
        app = make_app(make_state(api_key=["a", "b"], max_concurrency_per_key=1))
        async with client_of(app) as client:
            task = asyncio.create_task(client.post("/v1/completions", json=BUSY.wait, headers={"Authorization": "Bearer a"}))
            await app.state.entered.wait()
            assert (await client.post("/v1/completions", json=BUSY.echo, headers={"Authorization": "Bearer a"})).status_code == 429
            assert (await client.post("/v1/completions", json=BUSY.echo, headers={"Authorization": "Bearer b"})).status_code == 200
            task.cancel()

    run(walk())


@pytest.mark.parametrize("how", ["option", "header", "field"])
def test_a_request_past_its_deadline_is_504(how: str) -> None:
    async def walk() -> None:
        state = make_state(request_timeout=0.1 if how == "option" else 100)
        async with client_of(make_app(state)) as client:
            headers = {"X-Request-Timeout": "0.1"} if how == "header" else {}
            answer = await client.post("/v1/completions", json=BUSY.wait | ({"timeout": 0.1} if how == "field" else {}), headers=headers)
            assert answer.status_code == 504 and answer.json()["error"]["code"] == "deadline_exceeded"
        assert state.admission.requests == 0 and not state.running

    run(walk())


def test_a_stream_past_its_deadline_says_so_and_ends() -> None:
    async def walk() -> None:
        async with client_of(make_app(make_state())) as client:
            answer = await client.post("/v1/completions", json=BUSY.stream | {"timeout": 0.2})
            assert answer.text == "data: first\n\ndata: abort\n\n"

    run(walk())


@pytest.mark.parametrize("value", ["soon", "-1", "0", "nan", "inf", "1e999"])
def test_a_deadline_that_is_none_is_400(value: str) -> None:
    async def walk() -> None:
        async with client_of(make_app(make_state())) as client:
            assert (await client.post("/v1/completions", json=BUSY.echo, headers={"X-Request-Timeout": value})).status_code == 400
            assert (await client.post("/v1/completions", json=BUSY.echo | {"timeout": value})).status_code == 400

    run(walk())


def test_text_that_could_not_fit_is_not_tokenized() -> None:
    async def walk() -> None:
        engine = EdgeEngine(max_model_len=100)
        engine.tokenizer.get_vocab = lambda: {"ab": 0, "abcd": 1}
        async with client_of(make_app(make_state(engine))) as client:
            assert (await client.post("/v1/completions", json={"prompt": "x" * 400})).status_code == 200
            answer = await client.post("/v1/completions", json={"prompt": "x" * 401})
            assert answer.status_code == 400 and answer.json()["error"]["param"] == "prompt"
            assert answer.json()["error"]["code"] == "context_length_exceeded"
            assert (await client.post("/v1/completions", json={"prompt": "x" * 401, "truncate_prompt_tokens": 5})).status_code == 200

    run(walk())


def test_token_ids_that_could_not_fit_are_told_of_as_one_prompt() -> None:
    async def walk() -> None:
        async with client_of(make_app(make_state(EdgeEngine(max_model_len=100)))) as client:
            for prompt, count in (([1] * 2000, 2000), ([[1], [2] * 101], 101)):
                answer = await client.post("/v1/completions", json={"prompt": prompt})
                error = answer.json()["error"]
                assert (answer.status_code, error["param"], error["code"]) == (400, "prompt", "context_length_exceeded")
                assert f"the prompt has {count} token ids, more than max_model_len=100" in error["message"]
                assert (await client.post("/v1/completions", json={"prompt": prompt, "truncate_prompt_tokens": 5})).status_code == 200
            assert (await client.post("/v1/completions", json={"prompt": [1] * 100})).status_code == 200

    run(walk())


def test_a_draining_server_is_not_ready_and_takes_nothing_new() -> None:
    async def walk() -> None:
        state = make_state()
        app = make_app(state)
        async with client_of(app) as client:
            running = asyncio.create_task(client.post("/v1/completions", json=BUSY.wait))
            await app.state.entered.wait()
            state.draining = True
            assert (await client.get("/readyz")).status_code == 503
            assert (await client.get("/livez")).status_code == 200
            refused = await client.post("/v1/completions", json=BUSY.echo)
            assert refused.status_code == 503 and int(refused.headers["retry-after"]) > 0 and refused.headers["connection"] == "close"
            await state.engine.abort(["waiting"])
            assert (await running).status_code == 200

    run(walk())


def test_a_request_that_is_stopped_before_its_response_gets_the_reason() -> None:
    async def walk() -> None:
        state = make_state()
        app = make_app(state)
        async with client_of(app) as client:
            task = asyncio.create_task(client.post("/v1/completions", json=BUSY.wait))
            await app.state.entered.wait()
            (running,) = state.running
            running.stop(ApiError(503, "the end"))
            running.stop(ApiError(500, "not this"))
            answer = await task
            assert (answer.status_code, answer.json()["error"]["message"]) == (503, "the end")

    run(walk())


def test_refusals_are_counted_by_their_route_and_status() -> None:
    async def walk() -> None:
        app = create_app(make_state(EdgeEngine(1), api_key=["sk-right"], max_num_queued_reqs=0, max_body_bytes=100))
        state = app.state.server
        async with client_of(app) as client:
            ask = {"prompt": "x"}
            await client.post("/v1/completions", json=ask)
            await client.post("/v1/completions", content=b"{", headers=KEY)
            await client.post("/v1/completions", content=b" " * 101, headers=KEY)
            with state.admission.admit(Cost()):
                await client.post("/v1/completions", json=ask, headers=KEY)
            state.draining = True
            await client.post("/v1/completions", json=ask, headers=KEY)
            await client.post("/made/up/by/a/client", json=ask)
        families = {family.name: family for family in app.state.http_metrics.families(state.admission.refused)}
        found = {(s.labels["route"], s.labels["status"]): s.value for s in families["lockstep:http_requests"].samples}
        assert found == {**{("/v1/completions", status): 1 for status in ("401", "400", "413", "429", "503")}, ("unknown", "401"): 1}
        for name in ("lockstep:admission_rejections", "vllm:admission_rejections"):
            assert {s.labels["reason"]: s.value for s in families[name].samples} == {"queue": 1, "tokens": 0, "client": 0}
        own = [s for name, family in families.items() if name.startswith("process_") for s in family.samples]
        assert own and all(s.labels["api_server"] == "0" for s in own)

    run(walk())


@pytest.mark.parametrize("path", ["/livez", "/health", "/readyz", "/ready"])
def test_strangers_read_no_pids_paths_or_exceptions(path: str) -> None:
    told = {"replica": 1, "rank": 0, "state": "waiting", "pid": 77, "why": "secret of the server", "incident": "/home/x", "for_s": 1.0}
    engine: Any = EdgeEngine()
    engine.problems, engine.health, engine.takes_requests, engine.failure = lambda: [told], None, False, RuntimeError("x")

    async def problems(headers: dict[str, str], **options: Any) -> Any:
        async with client_of(create_app(make_state(engine, **options))) as client:
            answer = await client.get(path, headers=headers)
            assert answer.status_code == 503
            return answer.json()["problems"]

    async def walk() -> None:
        assert await problems({}, api_key=["sk-right"]) == [{"replica": 1, "rank": 0, "state": "waiting"}]
        assert await problems({"Authorization": "Bearer sk-wrong"}, api_key=["sk-right"]) == [{"replica": 1, "rank": 0, "state": "waiting"}]
        assert await problems(KEY, api_key=["sk-right"]) == await problems({}) == [told]

    run(walk())
