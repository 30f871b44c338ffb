"""What the tests of dying replicas share: a workload, its undisturbed answers, and ways to kill."""

from __future__ import annotations

import contextlib
import os
import random
import signal
from collections.abc import Callable
from typing import Any

import psutil

from lockstep.llm import LLM
from lockstep.protocol import SamplingParams

STREAMS, TOKENS = 32, 48
SMALL: dict[str, Any] = {"device": "cpu", "max_model_len": 256, "kv_cache_memory_bytes": 32 << 20, "threads_per_rank": 1}
PROMPTS = [f"def function_{i}(a, b):\n    " for i in range(STREAMS)]
# Greedy, seeded, penalised: all of them must go on with the tokens that would have followed.
PARAMS = [
    SamplingParams(
        temperature=0.0 if i % 3 == 0 else 0.9, seed=i, max_tokens=TOKENS, ignore_eos=True, presence_penalty=0.5 * (i % 2), logprobs=0
    )
    for i in range(STREAMS)
]


def streamed(llm: LLM, disturb: Any = None) -> list[list[int]]:
    """All streams at once; each stream's tokens as they came. disturb(tokens of all streams so far): called with each output."""
    tokens: dict[str, list[int]] = {}
    ended: dict[str, str | None] = {}
    count = 0
    for output in llm.stream(PROMPTS, PARAMS):
        (completion,) = output.outputs
        before = tokens.get(output.request_id, [])
        assert list(completion.token_ids[: len(before)]) == before, "a stream took tokens back"
        assert output.request_id not in ended, "a stream went on after its end"
        tokens[output.request_id] = list(completion.token_ids)
        if completion.finish_reason is not None:
            ended[output.request_id] = completion.finish_reason
        if disturb is not None:
            count += len(completion.token_ids) - len(before)
            disturb(count)
    assert set(ended.values()) == {"length"} and len(ended) == STREAMS
    return [tokens[name] for name in sorted(tokens, key=int)]


def once(moment: int, strike: Callable[[], object]) -> Callable[[int], None]:
    """Calls `strike` when so many tokens have come."""
    struck: list[int] = []

    def disturb(tokens: int) -> None:
        if tokens >= moment and not struck:
            struck.append(tokens)
            strike()

    return disturb


def processes(replica_pid: int) -> list[int]:
    """A replica's own process and its ranks'."""
    with contextlib.suppress(psutil.NoSuchProcess):
        return [replica_pid, *(child.pid for child in psutil.Process(replica_pid).children(recursive=True))]
    return []


def kill_one(llm: LLM, source: random.Random, how: int = signal.SIGKILL) -> int:
    """Kill a process of a replica that runs, the replica's own or a rank's; its pid, 0 if none ran."""
    pids = [pid for pid in llm._client.pids() if pid]  # type: ignore[attr-defined]
    victims = processes(source.choice(pids)) if pids else []
    if not victims:
        return 0
    victim = source.choice(victims)
    with contextlib.suppress(ProcessLookupError):
        os.kill(victim, how)
    return victim
