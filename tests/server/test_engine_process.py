"""The engine's process and what API processes make of its deaths, its calls and its silence, over engines that compute nothing."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import threading
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import zmq

from lockstep import SamplingParams
from lockstep.cluster.local import LocalClient
from lockstep.config.build import build_config
from lockstep.config.validate import resolve
from lockstep.executor.contract import ExecutorError
from lockstep.frontend import engine_server, engine_wire
from lockstep.frontend.async_engine import AsyncEngine
from lockstep.frontend.engine_keeper import EngineKeeper
from lockstep.frontend.engine_process import replaceable
from lockstep.frontend.engine_server import EngineServer, bind
from lockstep.frontend.outputs import RequestOutput
from lockstep.frontend.request_metrics import MetricsSnapshot
from lockstep.frontend.tokenizer import load_tokenizer
from lockstep.protocol import EngineOutput
from lockstep.server.launch_serving import connect
from lockstep.testing.fakes import FakeExecutor
from lockstep.testing.fragile import POISON
from lockstep.testing.paced import PacedClient, make
from tests.unit.test_engine_core import engine as core_of

SETTINGS = resolve(build_config(max_model_len=256, device="cpu", cpu_binding=False))
SHORT = SamplingParams(max_tokens=20, temperature=0, ignore_eos=True)


async def run(engine: AsyncEngine, prompt: list[int], wanted: SamplingParams = SHORT) -> RequestOutput:
    """The last output; its only completion's tokens are all there."""
    *_, last = [output async for output in engine.generate({"prompt_token_ids": prompt}, wanted)]
    assert last.finished
    return last


def go(work: Callable[[], Coroutine[Any, Any, None]], limit_s: float = 60.0) -> None:
    asyncio.run(asyncio.wait_for(work(), limit_s))


async def until(true: Callable[[], bool]) -> None:
    give_up_s = time.monotonic() + 30
    while not true():
        assert time.monotonic() < give_up_s, "it did not become true"
        await asyncio.sleep(0.02)


# --- a process of its own ---


@asynccontextmanager
async def kept() -> AsyncIterator[tuple[AsyncEngine, EngineKeeper]]:
    config, spec, folder = SETTINGS
    keeper = EngineKeeper(config, spec, folder, client="lockstep.testing.fragile:make_fragile")
    over = False

    async def keep() -> None:
        while not over:
            assert keeper.failure() is None, "the engine is given up"
            await asyncio.sleep(0.02)

    try:
        await asyncio.to_thread(keeper.wait)
        engine = AsyncEngine(keeper.endpoint, keeper.secret, spec, folder, load_tokenizer(folder))
        await engine.connect()
        keeping = asyncio.create_task(keep())
        yield engine, keeper
        over = True
        await keeping
        await engine.close()
    finally:
        keeper.close()


@pytest.mark.timeout(120)
def test_a_request_that_kills_engines_is_given_up_and_nobody_else() -> None:
    async def tell() -> None:
        async with kept() as (engine, keeper):
            first = [asyncio.create_task(run(engine, [5] * (i + 1))) for i in range(3)]
            await asyncio.sleep(0.1)
            poison = asyncio.create_task(run(engine, [POISON]))
            late = [asyncio.create_task(run(engine, [5] * (i + 1))) for i in range(3)]
            for output in await asyncio.gather(*first, *late):
                assert output.outputs[0].finish_reason == "length" and output.error is None
            error = (await poison).error
            assert error is not None and "given up" in error
            assert 2 <= keeper.restarts <= 5 and keeper.failure() is None
            assert (await run(engine, [5])).outputs[0].finish_reason == "length", "the server lives"

    go(tell, 100)


@pytest.mark.timeout(120)
@pytest.mark.parametrize("mode", ["pause", "sleep"])
def test_what_operators_want_outlives_the_engine(mode: str) -> None:
    async def tell() -> None:
        async with kept() as (engine, keeper):
            await engine.call(mode)
            waiting = asyncio.create_task(run(engine, [5]))
            died = keeper.pid
            os.kill(died, signal.SIGKILL)
            await until(lambda: engine.health is not None and engine.health.pid == keeper.pid != died)
            assert await engine.call("mode") == [True, int(mode == "sleep")]
            snapshot: MetricsSnapshot = await engine.call("metrics", type=MetricsSnapshot)
            assert snapshot.engine_restarts == 1
            await asyncio.sleep(0.3)
            assert not waiting.done(), "it runs"
            await engine.call("resume" if mode == "pause" else "wake_up")
            assert (await waiting).outputs[0].finish_reason == "length"

    go(tell)


# --- a thread ---


class Waiting(PacedClient):
    """A call of it waits, as that of all replicas does: news come meanwhile, and it ticks."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.entered, self.release = threading.Event(), threading.Event()
        self._meanwhile: list[EngineOutput] = []

    def start_profile(self) -> None:
        self.entered.set()
        while not self.release.is_set():
            self._meanwhile += PacedClient.step(self)
            self.tick()

    def gathered(self) -> list[EngineOutput]:
        found, self._meanwhile = self._meanwhile, []
        return found


class Threaded:
    """An engine's server on a thread."""

    def __init__(self, client: PacedClient, folder: Path, **options: Any) -> None:
        self.client, self.endpoint = client, f"ipc://{folder}/engine"
        self.context: zmq.Context[Any] = zmq.Context()
        self.server = EngineServer(client, bind(self.context, self.endpoint), "secret", **options)
        self.over = False
        client_step = client.step

        def step() -> list[EngineOutput]:
            if self.over:
                raise SystemExit
            return client_step()

        client.step = step  # type: ignore[method-assign]
        self.thread = threading.Thread(target=self._run, daemon=True)
        self.thread.start()

    def _run(self) -> None:
        with contextlib.suppress(SystemExit):
            self.server.run()

    def close(self) -> None:
        self.over = True
        self.thread.join(10)
        assert not self.thread.is_alive()
        self.server._socket.close(0)
        self.context.term()


@asynccontextmanager
async def threaded(folder: Path, kind: type[PacedClient] = Waiting) -> AsyncIterator[tuple[AsyncEngine, Threaded]]:
    config, spec, model = SETTINGS
    server = Threaded(kind(make(config, spec, model).config), folder)
    engine = AsyncEngine(server.endpoint, "secret", spec, model, load_tokenizer(model))
    try:
        await engine.connect()
        yield engine, server
    finally:
        await engine.close()
        await asyncio.to_thread(server.close)


def test_requests_go_on_during_a_call(tmp_path: Path) -> None:
    async def tell() -> None:
        async with threaded(tmp_path) as (engine, server):
            client = server.client
            assert isinstance(client, Waiting)
            before = asyncio.create_task(run(engine, [5]))
            call = asyncio.create_task(engine.call("start_profile"))
            await until(client.entered.is_set)
            second = asyncio.create_task(engine.call("pause"))
            during = await run(engine, [5, 6])
            assert during.outputs[0].finish_reason == (await before).outputs[0].finish_reason == "length"
            assert await engine.call("ping") and not call.done() and not second.done(), "it answers what asks no replica"
            client.release.set()
            await call, await second

    go(tell)


def test_who_is_dropped_comes_back_and_meets_the_engine_anew(tmp_path: Path) -> None:
    async def tell() -> None:
        async with threaded(tmp_path) as (engine, server):
            met: list[int] = []
            engine.on_welcome = lambda: met.append(engine._limits.num_blocks)
            running = asyncio.create_task(run(engine, [5]))
            await asyncio.sleep(0.2)
            server.client.memory = replace(server.client.memory, num_blocks=99)
            server.server._unreached[b"api-0"] = zmq.EAGAIN
            assert len((await running).outputs[0].token_ids) == SHORT.max_tokens
            assert met == [99] and engine.memory.num_blocks == 99

    go(tell)


def test_an_output_that_cannot_be_made_ends_one_request(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def tell() -> None:
        async with threaded(tmp_path) as (engine, _):
            take = engine._collector.take

            def fails(news: list[EngineOutput]) -> Any:
                if any(output.request_id == "#0-1" for output in news):
                    raise IndexError("no such token")
                return take(news)

            monkeypatch.setattr(engine._collector, "take", fails)
            bad, good = await asyncio.gather(run(engine, [5]), run(engine, [6]))
            assert bad.outputs[0].finish_reason == "error" and "IndexError" in (bad.error or "")
            assert good.outputs[0].finish_reason == "length" and engine.failure is None

    go(tell)


def test_a_connection_that_fails_ends_every_request(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def tell() -> None:
        async with threaded(tmp_path) as (engine, _):

            def fails(reply: Any) -> None:
                raise RuntimeError("nobody expected this")

            running = asyncio.create_task(run(engine, [5]))
            await asyncio.sleep(0.1)
            monkeypatch.setattr(engine, "_hear", fails)
            assert "nobody expected this" in ((await running).error or "")
            assert engine.failure is not None

    go(tell)


class Long(PacedClient):
    """Its steps take as long as they take."""

    ticks = False

    def step(self) -> list[EngineOutput]:
        time.sleep(1.5)
        return []


def test_a_long_step_is_no_silence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_server, "BESIDE_S", 0.1)
    monkeypatch.setattr(engine_server, "PULSE_S", 0.1)

    async def tell() -> None:
        async with threaded(tmp_path, Long) as (engine, _):
            ages = []
            for _ in range(40):
                await asyncio.sleep(0.05)
                ages.append(time.monotonic() - engine._pulse_s)
            assert max(ages) < 1.2

    go(tell)


# --- by hand ---


@pytest.fixture
def context() -> Iterator[zmq.Context[Any]]:
    found: zmq.Context[Any] = zmq.Context()
    yield found
    found.destroy(linger=0)


def admitted(context: zmq.Context[Any], server: EngineServer, endpoint: str) -> zmq.Socket[Any]:
    peer = context.socket(zmq.DEALER)
    peer.setsockopt(zmq.IDENTITY, b"api-0")
    peer.setsockopt(zmq.RCVHWM, 1)
    peer.connect(endpoint)
    mine = engine_wire.nonce()
    peer.send(engine_wire.encode(engine_wire.Hello(mine)))
    while True:
        server.turn()
        if peer.poll(10):
            reply = engine_wire.decode_reply(peer.recv())
            if isinstance(reply, engine_wire.Challenge):
                peer.send(engine_wire.encode(engine_wire.Proof(engine_wire.api_proof("secret", mine, reply.nonce))))
            if isinstance(reply, engine_wire.Welcome):
                return peer


class Loud(PacedClient):
    """Each step brings a large output of its only request."""

    aborted: tuple[str, ...] = ()

    def abort(self, request_ids: Any) -> None:
        self.aborted = (*self.aborted, *request_ids)

    def step(self) -> list[EngineOutput]:
        return [] if self.aborted else [EngineOutput(request_id="a", new_token_ids=[1 << 20] * 20_000)]


@pytest.mark.timeout(60)
def test_who_does_not_read_is_dropped_and_told_once_it_does(
    tmp_path: Path, context: zmq.Context[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine_server, "MOST_UNREAD", 4)
    config, spec, folder = SETTINGS
    client, endpoint = Loud(make(config, spec, folder).config), f"ipc://{tmp_path}/engine"
    server = EngineServer(client, bind(context, endpoint), "secret")
    peer = admitted(context, server, endpoint)
    server._owner["a"] = b"api-0"
    for _ in range(1000):
        server.turn()
        if client.aborted:
            break
    assert client.aborted == ("a",), "what it does not read grows without end"
    replies: list[Any] = []
    give_up_s = time.monotonic() + 20
    while not replies or not isinstance(replies[-1], engine_wire.Dropped):
        assert time.monotonic() < give_up_s
        server.turn()
        if peer.poll(10):
            replies.append(engine_wire.decode_reply(peer.recv()))


def test_who_hangs_up_with_a_word_is_forgotten_without_one(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("WARNING", logger="lockstep")  # whatever a test before this one configured

    async def tell() -> None:
        async with threaded(tmp_path) as (engine, server):
            running = asyncio.create_task(run(engine, [5]))
            await until(lambda: bool(server.server._owner))
            await engine.close()
            assert (await running).outputs[0].finish_reason == "error"
            await until(lambda: not server.server._admitted)
            assert not server.server._owner and not server.server._dropped
            await asyncio.sleep(3 * engine_server.PULSE_S)  # the next beats

    go(tell)
    assert not caplog.records, caplog.text


def test_a_goodbye_is_heard_where_the_hanging_up_is_noticed_first(
    tmp_path: Path, context: zmq.Context[Any], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("WARNING", logger="lockstep")  # whatever a test before this one configured
    config, spec, folder = SETTINGS
    client, endpoint = Loud(make(config, spec, folder).config), f"ipc://{tmp_path}/engine"
    server = EngineServer(client, bind(context, endpoint), "secret")
    peer = admitted(context, server, endpoint)
    server._owner["a"] = b"api-0"
    peer.send(engine_wire.encode(engine_wire.Goodbye()))
    peer.close(1000)
    give_up_s = time.monotonic() + 20
    while server._send(b"api-0", engine_wire.Dropped()):
        assert time.monotonic() < give_up_s
        time.sleep(0.01)
    server._drop_unreached()
    assert client.aborted == ("a",) and not caplog.records, caplog.text


@pytest.mark.parametrize("owned", [0, 1])
def test_who_is_gone_is_worth_an_error_if_it_ran_something(
    tmp_path: Path, context: zmq.Context[Any], caplog: pytest.LogCaptureFixture, owned: int
) -> None:
    caplog.set_level("WARNING", logger="lockstep")  # whatever a test before this one configured
    config, spec, folder = SETTINGS
    client, endpoint = Loud(make(config, spec, folder).config), f"ipc://{tmp_path}/engine"
    server = EngineServer(client, bind(context, endpoint), "secret")
    peer = admitted(context, server, endpoint)
    if owned:
        server._owner["a"] = b"api-0"
    peer.close(0)
    give_up_s = time.monotonic() + 20
    while server._admitted:
        assert time.monotonic() < give_up_s
        server.turn()
        server._beat_now()
    said = [record.getMessage() for record in caplog.records]
    assert said == ["api-0 is gone: 1 request of it ends here"] * owned and client.aborted == ("a",) * owned


class Failing(PacedClient):
    """Fails, and ends what it ran."""

    def step(self) -> list[EngineOutput]:
        self.failure = ExecutorError("rank 1 died")
        return [EngineOutput(request_id="a", new_token_ids=[], finish_reason="error", error="rank 1 died")]


@pytest.mark.parametrize("replaced", [False, True])
def test_who_is_replaced_dies_without_a_word(tmp_path: Path, context: zmq.Context[Any], replaced: bool) -> None:
    config, spec, folder = SETTINGS
    client, endpoint = PacedClient(make(config, spec, folder).config), f"ipc://{tmp_path}/engine"
    server = EngineServer(client, bind(context, endpoint), "secret", replaced=replaced)
    peer = admitted(context, server, endpoint)
    server._owner["a"] = b"api-0"
    client.__class__ = Failing
    with pytest.raises(ExecutorError, match="rank 1"):
        server.turn()
    said = []
    while peer.poll(300):
        said.append(type(engine_wire.decode_reply(peer.recv())))
    ends = [engine_wire.Outputs, engine_wire.Dead]
    assert [kind for kind in said if kind in ends] == ([] if replaced else ends)


@pytest.mark.parametrize(("backend", "again"), [("ray", True), ("mp", False)])
def test_a_single_engine_on_ray_is_worth_another_start(backend: str, again: bool) -> None:
    client = LocalClient(core_of(FakeExecutor()))
    client.config = replace(client.config, parallel=replace(client.config.parallel, distributed_executor_backend=backend))
    assert replaceable(client) is again


# --- the wait for an engine ---


class Absent:
    """An engine that does not answer."""

    closed = False

    async def connect(self, timeout_s: float) -> None:
        await asyncio.sleep(timeout_s)

    async def close(self) -> None:
        self.closed = True


def test_who_waits_for_the_engine_hears_that_there_is_none() -> None:
    async def tell() -> None:
        engine: Any = Absent()
        with pytest.raises(ExecutorError, match="given up"):
            await connect(engine, 60.0, lambda: ExecutorError("given up"), lambda: False)
        assert engine.closed

    go(tell, 10)


def test_who_waits_for_the_engine_hears_a_signal() -> None:
    async def tell() -> None:
        engine: Any = Absent()
        signals: list[int] = []
        asyncio.get_running_loop().call_later(0.1, signals.append, signal.SIGTERM)
        assert not await connect(engine, 60.0, lambda: None, lambda: bool(signals)) and engine.closed

    go(tell, 10)
