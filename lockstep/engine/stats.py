"""What the engine is doing, as numbers."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from lockstep.observability.histogram import Histogram
from lockstep.protocol import RankLive

TOKEN_BOUNDS = (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)
STEP_BOUNDS = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0)


class EngineLoad(msgspec.Struct, array_like=True, frozen=True):
    """What an engine carries at a moment: what a router balances."""

    waiting_tokens: int  # of prompts (and of what was generated before a preemption), still to be computed
    running_tokens: int  # that running requests hold in the cache
    requests: int  # that have not ended


class EngineStats(msgspec.Struct, kw_only=True, frozen=True):
    """A snapshot. Counters (marked +) only grow."""

    running: int
    waiting: int
    steps_in_flight: int
    kv_blocks: int
    kv_blocks_used: int
    steps: int  # + plans issued
    scheduled_tokens: int  # + tokens those plans compute
    generated_tokens: int  # + tokens that reached a request
    prefix_query_tokens: int  # + prompt tokens of requests that may read the prefix cache
    prefix_hit_tokens: int  # + of them, found there
    preemptions: int  # + requests that lost their blocks and start again
    finished: int  # + requests that ended, for whatever reason

    @property
    def kv_usage(self) -> float:
        """Share of the KV blocks that requests hold, 0 to 1."""
        return self.kv_blocks_used / self.kv_blocks

    @property
    def prefix_hit_rate(self) -> float:
        """Share of the prompt tokens that the prefix cache spared, 0 to 1."""
        return self.prefix_hit_tokens / self.prefix_query_tokens if self.prefix_query_tokens else 0.0


def combined(stats: Sequence[EngineStats]) -> EngineStats:
    """The numbers of several engines, added up."""
    return EngineStats(**{name: sum(getattr(one, name) for one in stats) for name in EngineStats.__struct_fields__})


class StepTotals(msgspec.Struct, array_like=True):
    """What an engine's steps came to. All of it only grows."""

    tokens: Histogram  # computed in a step
    seconds: Histogram  # that a step added
    busy_s: float = 0.0  # all steps' seconds
    predicted: int = 0  # steps for which there was a prediction,
    predicted_s: float = 0.0  # the sum of these,
    measured_s: float = 0.0  # how long the same steps took,
    error_s: float = 0.0  # and the sum of what each was off by, either way

    @classmethod
    def empty(cls) -> StepTotals:
        return cls(Histogram.of(TOKEN_BOUNDS), Histogram.of(STEP_BOUNDS))

    def copy(self) -> StepTotals:
        """These, as they are now."""
        return msgspec.structs.replace(self, tokens=self.tokens.copy(), seconds=self.seconds.copy())


class EngineReport(msgspec.Struct, array_like=True):
    """What an engine tells of itself twice a second, so that nobody has to ask."""

    stats: EngineStats
    steps: StepTotals
    ranks: list[RankLive]
