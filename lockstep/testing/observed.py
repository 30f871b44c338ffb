"""Reports and snapshots made by hand, for tests of what is made of them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from lockstep.cluster.live import LiveBook, Recoveries, ReplicaNow
from lockstep.config.tree import EngineConfig, ParallelConfig
from lockstep.engine.stats import EngineReport, EngineStats, StepTotals
from lockstep.protocol import EngineOutput, EngineRequest, RankLive, SamplingParams


def stats(**numbers: int) -> EngineStats:
    """An engine's numbers: 0 where not given, of 100 KV blocks."""
    return EngineStats(**dict.fromkeys(EngineStats.__struct_fields__, 0) | {"kv_blocks": 100} | numbers)


def report(steps: int, seconds: float, ranks: Iterable[RankLive], **numbers: int) -> EngineReport:
    """After `steps` steps of `seconds` each, of 4 tokens."""
    totals = StepTotals.empty()
    for _ in range(steps):
        totals.tokens.observe(4)
        totals.seconds.observe(seconds)
        totals.busy_s += seconds
    totals.predicted, totals.predicted_s, totals.measured_s = steps, steps * seconds, steps * seconds
    return EngineReport(stats(steps=steps, **numbers), totals, list(ranks))


def rank(number: int, steps: int, step_s: float, wait_s: float = 0.0, **more: Any) -> RankLive:
    """A rank after `steps` steps of `step_s`, in each of which it waited for `wait_s`."""
    return RankLive(rank=number, pid=100 + number, steps=steps, step_s=steps * step_s, wait_s=steps * wait_s, **more)


class ObservedClient:
    """What request metrics ask of an engine client: two replicas of two ranks, which have reported."""

    def __init__(self) -> None:
        self.config = EngineConfig(parallel=ParallelConfig(tensor_parallel_size=2, data_parallel_size=2))
        book = LiveBook(self.config.parallel, 2)
        for replica in range(2):
            for steps in (10, 30):
                collectives = {"tp:0.layers": (steps, 0.01), "tp:0.all_gather": (steps, 0.02)}
                ranks = [rank(i, steps, 0.02, beat_age_s=0.1, collectives=collectives, memory_bytes=1 << 28) for i in range(2)]
                numbers = {"running": 1, "waiting": 2, "kv_blocks_used": 25, "prefix_query_tokens": 8, "prefix_hit_tokens": 4}
                book.heard(replica, report(steps, 0.02, ranks, preemptions=1, generated_tokens=4 * steps, **numbers), now_s=float(steps))
        self._book = book
        self.losses = Recoveries()

    def live(self) -> list[ReplicaNow]:
        return [self._book.now(replica, "ready", replica, now_s=30.5) for replica in range(2)]

    def recoveries(self) -> Recoveries:
        return self.losses


def request(
    name: str, prompt: int = 8, *, arrival_s: float = 0.0, n: int = 1, choice: int = 0, max_tokens: int | None = 16
) -> EngineRequest:
    """A request of so many prompt tokens."""
    return EngineRequest(
        request_id=name,
        prompt_token_ids=list(range(prompt)),
        sampling=SamplingParams(n=n, max_tokens=max_tokens),
        seed=0,
        choice=choice,
        arrival_s=arrival_s,
    )


def output(name: str, tokens: int = 1, **more: Any) -> EngineOutput:
    """An output of so many tokens."""
    return EngineOutput(request_id=name, new_token_ids=[7] * tokens, **more)
