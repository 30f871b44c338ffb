"""A replica that dies is an event: its streams go on elsewhere with exactly the tokens of the undisturbed run."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from functools import cache, partial
from pathlib import Path
from typing import Any

import msgspec
import pytest

from lockstep.cluster.replica import ReplicaProcess
from lockstep.cluster.router import DataParallelClient
from lockstep.config.build import build_config
from lockstep.config.errors import ConfigError
from lockstep.config.validate import resolve
from lockstep.engine.errors import RequestError
from lockstep.engine.stats import EngineStats
from lockstep.executor.contract import ExecutorError
from lockstep.llm import LLM
from lockstep.protocol import EngineOutput, EngineRequest, SamplingParams
from lockstep.testing.tiny import make_tiny
from lockstep.utils import procs
from tests.chaos.replica_jobs import PARAMS, PROMPTS, SMALL, STREAMS, TOKENS, kill_one, once, processes, streamed


@cache
def undisturbed() -> list[list[int]]:
    with LLM(**SMALL) as llm:
        return streamed(llm)


@pytest.fixture(scope="module")
def two() -> Iterator[LLM]:
    with LLM(data_parallel_size=2, **SMALL) as llm:
        yield llm


def client(llm: LLM) -> DataParallelClient:
    assert isinstance(llm._client, DataParallelClient)
    return llm._client


def both_ready(llm: LLM) -> None:
    """Wait until every replica is back."""
    deadline = time.monotonic() + 60
    client(llm).step()
    while not all(client(llm).pids()) or not all(load.routable for load in client(llm).book.loads):
        assert time.monotonic() < deadline, "a replica did not come back"
        client(llm).step()


def _kill(llm: LLM, source: random.Random, killed: list[int]) -> None:
    killed.append(kill_one(llm, source))


def test_two_replicas_answer_as_one(two: LLM) -> None:
    outputs = two.generate(PROMPTS, PARAMS, use_tqdm=False)
    assert [list(o.outputs[0].token_ids) for o in outputs] == undisturbed()
    assert [o.prompt for o in outputs] == PROMPTS, "in the prompts' order"
    assert two.collective_rpc("ping") == [0, 0], "one rank each"
    each = [msgspec.msgpack.decode(v, type=EngineStats).generated_tokens for _, v in client(two)._call("stats")]
    assert min(each) > 0.3 * sum(each), "both have worked"
    assert two.stats().finished >= len(PROMPTS) and two.stats().kv_blocks_used == 0
    assert all(load.requests == load.tokens == 0 for load in client(two).book.loads), "nothing is left in the book"


@pytest.mark.timeout(180)
def test_kill_9_in_the_middle_is_not_seen(two: LLM) -> None:
    both_ready(two)
    victim = client(two).pids()[0]
    tokens = streamed(two, once(200, lambda: os.kill(victim, signal.SIGKILL)))
    assert tokens == undisturbed()
    assert client(two).recoveries_s
    both_ready(two)
    assert client(two).supervisor.restarts >= 1
    assert victim not in client(two).pids() and len(client(two).pids()) == 2
    assert streamed(two) == undisturbed(), "the new replica answers as the old one"


@pytest.mark.timeout(180)
def test_a_rank_of_a_replica_dies() -> None:
    with LLM(data_parallel_size=2, tensor_parallel_size=2, **SMALL) as llm:
        ranks = [pid for pid in processes(client(llm).pids()[1]) if pid != client(llm).pids()[1]]
        assert len(ranks) == 2
        tokens = streamed(llm, once(150, lambda: os.kill(ranks[1], signal.SIGKILL)))
        assert tokens == undisturbed()
        everyone = [pid for replica in client(llm).pids() if replica for pid in processes(replica)]
    assert procs.wait_gone([*everyone, *ranks], 10) == []


def kill(llm: LLM, replica: int) -> None:
    """Kill a replica's process and wait until it is gone: letting go of its memory takes it a moment."""
    process = client(llm)._fleet._replicas[replica].process  # type: ignore[union-attr]
    process.kill()
    process.wait(10)


LONG = SamplingParams(temperature=0, max_tokens=220, ignore_eos=True)


def test_an_abort_reaches_the_replica(two: LLM) -> None:
    both_ready(two)
    before = two.stats().generated_tokens
    for output in two.stream(PROMPTS[:8], LONG):
        if len(output.outputs[0].token_ids) > 3:
            break  # leaving the iterator aborts all of them
    deadline = time.monotonic() + 20
    while two.stats().kv_blocks_used or two.stats().running:
        assert time.monotonic() < deadline
    assert two.stats().generated_tokens - before < 8 * 100, "they were generated to their end"
    assert all(load.requests == 0 for load in client(two).book.loads)


def engine_request(name: str, tokens: int = 200, **sampling: Any) -> EngineRequest:
    params = SamplingParams(**{"temperature": 0, "max_tokens": tokens, "ignore_eos": True, **sampling})
    return EngineRequest(request_id=name, prompt_token_ids=[5, 6, 7, 8], sampling=params, seed=0)


def ends_of(engine: DataParallelClient, *names: str) -> dict[str, EngineOutput]:
    """Step until all of these have ended; their last outputs."""
    ends: dict[str, EngineOutput] = {}
    deadline = time.monotonic() + 60
    while not ends.keys() >= set(names):
        assert time.monotonic() < deadline, f"only {sorted(ends)} ended"
        for output in engine.step():
            if output.finish_reason is not None:
                assert output.request_id not in ends, "ended twice"
                ends[output.request_id] = output
    return ends


def test_an_abort_holds_when_the_replica_dies(two: LLM) -> None:
    """It is stopped before it can hear of the abort, and killed: nobody takes the request up again."""
    both_ready(two)
    engine = client(two)
    engine.add_request(engine_request("gone"))
    engine.add_request(engine_request("stays", 20))
    where = engine._live["gone"].replica
    os.kill(engine.pids()[where], signal.SIGSTOP)
    engine.abort(["gone"])
    kill(two, where)
    ends = ends_of(engine, "gone", "stays")
    assert (ends["gone"].finish_reason, ends["stays"].finish_reason) == ("abort", "length")
    for _ in range(20):
        assert not [o for o in engine.step() if o.request_id == "gone"]
    both_ready(two)


def test_an_id_is_free_once_its_end_was_taken(two: LLM) -> None:
    both_ready(two)
    engine = client(two)
    engine.add_request(engine_request("a"))
    engine.abort(["a"])
    with pytest.raises(RequestError, match="'a' is in use"):
        engine.add_request(engine_request("a"))
    assert ends_of(engine, "a")["a"].finish_reason == "abort"
    engine.add_request(engine_request("a", 3))
    assert ends_of(engine, "a")["a"].finish_reason == "length"


def test_a_death_while_idle_is_noticed_before_the_next_request(two: LLM) -> None:
    both_ready(two)
    kill(two, 0)
    assert two.stats().running == 0, "the other replica answers"
    engine = client(two)
    engine.add_request(engine_request("next", 5))
    assert engine._live["next"].replica == 1
    assert ends_of(engine, "next")["next"].finish_reason == "length"
    both_ready(two)


def test_who_asks_for_a_replica_that_is_down_is_answered_by_another(two: LLM) -> None:
    both_ready(two)
    kill(two, 1)
    (found,) = two.generate(PROMPTS[0], PARAMS[0], use_tqdm=False, data_parallel_rank=1)
    assert list(found.outputs[0].token_ids) == undisturbed()[0]
    both_ready(two)


def test_a_call_of_all_replicas_waits_for_the_one_that_comes_back(two: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    both_ready(two)
    kill(two, 0)
    assert two.collective_rpc("ping") == [0, 0], "nobody is left out without a word"
    kill(two, 1)
    monkeypatch.setattr("lockstep.cluster.router.REPAIR_S", 0.0)
    with pytest.raises(ExecutorError, match=r"collective_rpc is for every replica, and \[1\] have not come back in 0 s: call again"):
        two.collective_rpc("ping")
    both_ready(two)


def test_an_answer_that_nobody_waits_for_any_more_is_not_kept(two: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    both_ready(two)
    engine = client(two)
    monkeypatch.setattr("lockstep.cluster.router.CALL_S", -1.0)
    with pytest.raises(TimeoutError, match="did not answer the call of stats"):
        two.stats()
    monkeypatch.undo()
    assert two.stats().kv_blocks > 0, "which comes behind the late ones"
    assert not engine._answers


def test_both_replicas_die_at_once(two: LLM) -> None:
    both_ready(two)
    victims = client(two).pids()

    def strike() -> None:
        for pid in victims:
            os.kill(pid, signal.SIGKILL)

    assert streamed(two, once(300, strike)) == undisturbed()
    both_ready(two)


def test_what_was_given_once_is_not_given_again(two: LLM) -> None:
    """n > 1, a stop string and prompt log-probabilities across a death."""
    params = SamplingParams(temperature=0.8, seed=3, n=3, max_tokens=40, ignore_eos=True, prompt_logprobs=1, stop=["zzzz"], logprobs=1)
    both_ready(two)
    want = two.generate(PROMPTS[:4], params, use_tqdm=False)
    both_ready(two)
    victim, found = client(two).pids()[0], {}
    strike = once(1, lambda: os.kill(victim, signal.SIGKILL))
    for output in two.stream(PROMPTS[:4], params):
        strike(sum(len(c.token_ids) for c in output.outputs))
        found[output.request_id] = output
    for w, name in zip(want, sorted(found, key=int), strict=True):
        assert [c.token_ids for c in found[name].outputs] == [c.token_ids for c in w.outputs]
        assert found[name].prompt_logprobs == w.prompt_logprobs
    both_ready(two)


def test_a_start_that_fails_is_tried_again(two: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    both_ready(two)
    real, refused = ReplicaProcess.__init__, []

    def once_not(self: ReplicaProcess, *args: Any, **told: Any) -> None:
        if not refused:
            refused.append(1)
            raise BlockingIOError(11, "Resource temporarily unavailable")
        real(self, *args, **told)

    monkeypatch.setattr(ReplicaProcess, "__init__", once_not)
    kill(two, 1)
    deadline = time.monotonic() + 20
    while not refused:
        assert time.monotonic() < deadline
        client(two).step()
    both_ready(two)


@pytest.mark.timeout(120)
def test_a_replica_that_is_stopped_is_replaced(two: LLM, caplog: pytest.LogCaptureFixture) -> None:
    """It is its only rank's process too: that rank is named, with its stack."""
    both_ready(two)
    engine = client(two)
    victim = engine.pids()[1]
    assert streamed(two, once(100, lambda: os.kill(victim, signal.SIGSTOP))) == undisturbed()
    assert f"replica 1 (pid {victim}) was stopped" in caplog.text
    assert procs.wait_gone([victim], 10) == []
    both_ready(two)


def test_more_descriptors_than_select_knows(two: LLM) -> None:
    both_ready(two)
    files = [os.open("/dev/null", os.O_RDONLY) for _ in range(1100)]
    try:
        kill(two, 0)
        both_ready(two)
        assert streamed(two) == undisturbed()
    finally:
        for fd in files:
            os.close(fd)


def test_the_exit_of_a_forked_child_leaves_the_replicas_alone() -> None:
    code = (
        "import os, sys\n"
        "from lockstep.llm import LLM\n"
        f"with LLM(data_parallel_size=2, **{SMALL!r}) as llm:\n"
        "    before = llm._client.pids()\n"
        "    pid = os.fork()\n"
        "    if pid == 0:\n"
        "        sys.exit(0)\n"
        "    os.waitpid(pid, 0)\n"
        "    llm._client.step()\n"
        "    print(llm.collective_rpc('ping'), llm._client.supervisor.restarts, llm._client.pids() == before)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.split() == ["[0,", "0]", "0", "True"]


def test_a_paused_reader_does_not_hold_up_the_end() -> None:
    llm = LLM(data_parallel_size=2, **SMALL)
    stream = llm.stream(PROMPTS, PARAMS)
    next(stream)
    time.sleep(1.0)
    began = time.monotonic()
    llm.shutdown()
    assert time.monotonic() - began < 5.0


def test_wrong_requests_are_refused_before_they_travel(two: LLM) -> None:
    with pytest.raises(ValueError, match="max_model_len=256"):
        two.generate({"prompt_token_ids": [1] * 300}, use_tqdm=False)
    request = EngineRequest(request_id="twice", prompt_token_ids=[1], sampling=SamplingParams(max_tokens=1), seed=0)
    client(two).add_request(request)
    with pytest.raises(RequestError, match="'twice' is in use"):
        client(two).add_request(request)
    while not any(o.request_id == "twice" and o.finish_reason for o in client(two).step()):
        pass


def test_a_profile_has_every_replica(two: LLM) -> None:
    both_ready(two)
    two.start_profile()
    two.generate(PROMPTS[:4], SamplingParams(max_tokens=2), use_tqdm=False)
    names = [track.name for track in two.stop_profile().tracks]
    assert names == ["replica 0 engine", "replica 0 rank 0", "replica 1 engine", "replica 1 rank 0"]


def test_a_replica_that_cannot_start_is_said_at_once(tmp_path: Path) -> None:
    model = str(make_tiny("llama", tmp_path))
    with pytest.raises(ConfigError, match=r"replica .*max_model_len=512 does not fit"):
        LLM(model, data_parallel_size=2, max_model_len=512, kv_cache_memory_bytes=1 << 12, device="cpu")
    (tmp_path / "model.safetensors").write_bytes(b"broken")
    with pytest.raises(ExecutorError, match="replica"):
        LLM(model, data_parallel_size=2, device="cpu")


@pytest.mark.timeout(120)
def test_a_request_that_kills_every_replica_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each time it starts, its replica is killed: it ends with an error that says so, and only it."""
    config, spec, folder = resolve(build_config(data_parallel_size=2, **SMALL))
    monkeypatch.setattr("lockstep.cluster.router.MOST_REPLAYS", 1)
    engine = DataParallelClient(config, spec, folder)
    try:
        poison = EngineRequest(
            request_id="poison", prompt_token_ids=[5] * 9, sampling=SamplingParams(max_tokens=200, ignore_eos=True), seed=0
        )
        engine.add_request(poison)
        ends: list[EngineOutput] = []
        while not ends:
            ends = [o for o in engine.step() if o.finish_reason is not None]
            at = engine._live["poison"].replica if "poison" in engine._live else -1
            if at >= 0 and engine._live["poison"].tokens and engine.pids()[at]:
                os.kill(engine.pids()[at], signal.SIGKILL)
        assert ends[0].finish_reason == "error" and "2 replicas died" in (ends[0].error or "")
        assert engine.failure is None
    finally:
        engine.shutdown()


@pytest.mark.full
@pytest.mark.timeout(1800)
def test_fifty_rounds_of_kill_9_at_random_moments() -> None:
    """`make chaos`: 32 streams, a random process of a random replica killed at a random moment, 50 times."""
    want, source = undisturbed(), random.Random(int(os.environ.get("CHAOS_SEED", "0")))
    with LLM(data_parallel_size=2, tensor_parallel_size=2, **SMALL) as llm:
        for number in range(50):
            both_ready(llm)
            killed: list[int] = []
            moment = source.randrange(STREAMS * TOKENS - STREAMS)
            assert streamed(llm, once(moment, partial(_kill, llm, source, killed))) == want, f"round {number}"
            assert killed and killed[0]
        found = sorted(client(llm).recoveries_s)
        print(
            f"\n50 rounds, {client(llm).supervisor.restarts} restarts, {len(found)} streams replayed; from the loss to the next token: ",
            end="",
        )
        print(f"median {found[len(found) // 2]:.3f} s, p99 {found[int(len(found) * 0.99)]:.3f} s, longest {found[-1]:.3f} s")
        everyone = [pid for replica in client(llm).pids() if replica for pid in processes(replica)]
    assert procs.wait_gone(everyone, 10) == []


PROGRAM = """
import os
from lockstep.llm import LLM
sizes = dict(data_parallel_size=2, tensor_parallel_size=2, max_model_len=256, num_gpu_blocks_override=64)
llm = LLM(cpu_binding=False, threads_per_rank=1, **sizes)
print("ready", *llm._client.pids(), flush=True)
os.read(0, 1)
"""


def test_a_stopped_replica_ends_with_its_killed_program() -> None:
    """What is stopped reads no pipe: the kernel has to end it."""
    command = [sys.executable, "-c", PROGRAM]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as program:
        assert program.stdout is not None
        word, *pids = program.stdout.readline().split()
        assert word == "ready" and len(pids) == 2
        everyone = [pid for replica in pids for pid in processes(int(replica))]
        assert len(everyone) == 6
        os.kill(int(pids[0]), signal.SIGSTOP)
        program.kill()
        program.wait(10)
    assert procs.wait_gone(everyone, 10) == []
