"""What a simulated run came to."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from statistics import fmean


@dataclass
class Served:
    """One request's times, in seconds of the virtual clock. Written by the simulation while it runs."""

    arrival_s: float
    input_tokens: int
    replica: int
    token_s: list[float] = field(default_factory=list)  # when each output token came
    preemptions: int = 0
    ended: bool = False
    refused: str = ""  # why it never ran

    @property
    def ttft_s(self) -> float:
        """Time to the first token."""
        return self.token_s[0] - self.arrival_s

    @property
    def tpot_s(self) -> float | None:
        """Time per output token after the first; None for a single token."""
        return (self.token_s[-1] - self.token_s[0]) / (len(self.token_s) - 1) if len(self.token_s) > 1 else None

    @property
    def end_to_end_s(self) -> float:
        """From its arrival to its last token."""
        return self.token_s[-1] - self.arrival_s


@dataclass
class Gauge:
    """A number that stands for a while, averaged over time."""

    most: float = 0.0
    _sum: float = 0.0
    _value: float = 0.0
    _since_s: float = 0.0

    def set(self, value: float, now_s: float) -> None:
        """It is `value` from now on."""
        self._sum += self._value * (now_s - self._since_s)
        self._value, self._since_s, self.most = value, now_s, max(self.most, value)

    def mean(self, until_s: float) -> float:
        """Over the time from 0 to `until_s`."""
        return (self._sum + self._value * (until_s - self._since_s)) / until_s if until_s > 0 else self._value


@dataclass
class ReplicaReport:
    """One replica's gauges and counts."""

    waiting: Gauge = field(default_factory=Gauge)  # requests
    running: Gauge = field(default_factory=Gauge)  # requests
    kv_usage: Gauge = field(default_factory=Gauge)  # share of the blocks, 0 to 1
    steps: int = 0
    stage_busy_s: list[float] = field(default_factory=list)


@dataclass(frozen=True)
class Report:
    """A whole run: every request in order of arrival, every replica, and when the last token came."""

    requests: Sequence[Served]
    replicas: Sequence[ReplicaReport]
    end_s: float

    @property
    def served(self) -> list[Served]:
        """Those that ran."""
        return [r for r in self.requests if not r.refused]

    def between(self, since_s: float, until_s: float) -> Window:
        """What happened after `since_s`, up to `until_s`."""
        return Window(self.requests, since_s, until_s)

    @property
    def output_tokens(self) -> int:
        return sum(len(r.token_s) for r in self.requests)

    @property
    def throughput(self) -> float:
        """Output tokens a second, from time 0 to the last."""
        return self.output_tokens / self.end_s if self.end_s else 0.0

    def ttft_s(self, share: float = 0.5) -> float:
        """The time to the first token that `share` of the requests stay within."""
        return quantile((r.ttft_s for r in self.served), share)

    def tpot_s(self, share: float = 0.5) -> float:
        """The time per output token that `share` of the requests stay within; 0 where all have one token."""
        return quantile((r.tpot_s for r in self.served if r.tpot_s is not None), share)

    def waiting(self) -> float:
        """Requests that wait, over all replicas, on average."""
        return sum(r.waiting.mean(self.end_s) for r in self.replicas)

    def kv_usage(self) -> float:
        """Share of the KV blocks in use, mean of time and replicas."""
        return sum(r.kv_usage.mean(self.end_s) for r in self.replicas) / len(self.replicas)

    def stage_usage(self) -> list[float]:
        """Share of the time in which each stage computes, mean of the replicas."""
        busy = zip(*(r.stage_busy_s for r in self.replicas), strict=True)
        return [sum(stage) / len(self.replicas) / self.end_s for stage in busy] if self.end_s else []

    def describe(self) -> str:
        """The figures as text."""
        milli = [f"{f(share) * 1e3:.2f}" for f in (self.ttft_s, self.tpot_s) for share in (0.5, 0.9, 0.99)]
        refused = len(self.requests) - len(self.served)
        waiting = max(r.waiting.most for r in self.replicas)
        peak = max(r.kv_usage.most for r in self.replicas)
        return "\n".join(
            [
                f"requests     {len(self.served)} in {self.end_s:.3f} s" + (f", {refused} refused" if refused else ""),
                f"TTFT         {milli[0]} ms median, {milli[1]} p90, {milli[2]} p99",
                f"TPOT         {milli[3]} ms median, {milli[4]} p90, {milli[5]} p99",
                f"throughput   {self.throughput:.1f} output tokens/s",
                f"waiting      {self.waiting():.2f} requests on average, {waiting:.0f} at most on a replica",
                f"KV cache     {self.kv_usage():.1%} used on average, {peak:.1%} at most",
                f"preemptions  {sum(r.preemptions for r in self.requests)}",
                f"stages busy  {', '.join(f'{share:.1%}' for share in self.stage_usage())}",
            ]
        )


@dataclass(frozen=True)
class Window:
    """The steady middle of a run: what came after `since_s`, up to `until_s`; each event counts when it happened.

    So requests that began before it, or end after it, are not a kind of their own that is left out.
    """

    requests: Sequence[Served]
    since_s: float
    until_s: float

    def _inside(self, at_s: float) -> bool:
        return self.since_s < at_s <= self.until_s

    @property
    def ended(self) -> list[Served]:
        """Requests whose last token came."""
        return [r for r in self.requests if r.ended and self._inside(r.token_s[-1])]

    @property
    def rate(self) -> float:
        """Requests per second that ended."""
        return len(self.ended) / (self.until_s - self.since_s)

    @property
    def throughput(self) -> float:
        """Output tokens per second."""
        return sum(self._inside(at_s) for r in self.requests for at_s in r.token_s) / (self.until_s - self.since_s)

    def ttft_s(self, share: float = 0.5) -> float:
        """The time to the first token that `share` of those that came stay within."""
        return quantile((r.ttft_s for r in self._began()), share)

    def tpot_s(self, share: float = 0.5) -> float:
        """The time per output token that `share` of the requests that ended stay within; 0 where all have one token."""
        return quantile((r.tpot_s for r in self.ended if r.tpot_s is not None), share)

    @property
    def mean_ttft_s(self) -> float:
        return mean([r.ttft_s for r in self._began()])

    @property
    def mean_tpot_s(self) -> float:
        return mean([r.tpot_s for r in self.ended if r.tpot_s is not None])

    def ttft_growth(self) -> float:
        """The median time to the first token in the second half of the window over that in the first."""
        middle = (self.since_s + self.until_s) / 2
        halves = [quantile((r.ttft_s for r in self._began() if (r.token_s[0] > middle) == late), 0.5) for late in (False, True)]
        return halves[1] / halves[0] if halves[0] else 1.0

    def _began(self) -> list[Served]:
        """The requests whose first token came in the window."""
        return [r for r in self.requests if r.token_s and self._inside(r.token_s[0])]


def mean(values: Sequence[float]) -> float:
    """The mean; 0 of nothing."""
    return fmean(values) if values else 0.0


def quantile(values: Iterable[float], share: float) -> float:
    """The nearest-rank quantile; 0 of nothing."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, max(0, -(-int(share * 1e6) * len(ordered) // 1_000_000) - 1))] if ordered else 0.0
