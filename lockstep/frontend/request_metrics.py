"""What requests come to, counted where all of them pass: in the engine's process, in front of the engine client.

One source of truth, however many API processes there are: they ask for a `MetricsSnapshot`, and make text of it. Counting a token
costs about a microsecond; nothing here waits, or asks a replica.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import msgspec

from lockstep.cluster.contract import EngineClient
from lockstep.cluster.live import ReplicaNow
from lockstep.frontend.cluster_view import cluster_view
from lockstep.frontend.stats_log import StatsLog
from lockstep.observability.histogram import Histogram
from lockstep.protocol import EngineOutput, EngineRequest

FIRST = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0, 160.0, 640.0, 2560.0)
BETWEEN = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0)
WHOLE = (
    0.01,
    0.03,
    0.1,
    0.3,
    0.5,
    0.8,
    1.0,
    1.5,
    2.0,
    2.5,
    5.0,
    10.0,
    15.0,
    20.0,
    30.0,
    40.0,
    50.0,
    60.0,
    120.0,
    240.0,
    480.0,
    960.0,
    1920.0,
)
TOKENS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000, 20000, 50000, 100000, 200000, 500000, 1000000)
FEW = (1, 2, 5, 10, 20)
# name -> bounds; each counts a request (a completion, where n > 1) once, time_to_first_token only those that came to one
HISTOGRAMS: dict[str, tuple[float, ...]] = {
    "time_to_first_token_seconds": FIRST,
    "inter_token_latency_seconds": BETWEEN,  # each token after the first
    "request_time_per_output_token_seconds": BETWEEN,  # the mean of a request of two tokens or more
    "e2e_request_latency_seconds": WHOLE,
    "request_queue_time_seconds": WHOLE,
    "request_prefill_time_seconds": WHOLE,
    "request_decode_time_seconds": WHOLE,
    "request_inference_time_seconds": WHOLE,
    "request_prompt_tokens": TOKENS,
    "request_generation_tokens": TOKENS,
    "request_max_num_generation_tokens": TOKENS,  # of a request's completions, once
    "request_prefill_kv_computed_tokens": TOKENS,  # of its prompt, what the cache did not spare
    "request_params_n": FEW,  # a request of several completions counts once
    "request_params_max_tokens": TOKENS,
    "request_num_preemptions": FEW,
}
REASONS = ("stop", "length", "abort", "error")
RECENT_FIRST, RECENT_BETWEEN = 1024, 4096
INCOMPLETE_S = 10.0  # so long after the last of a request's completions ended here, the others are not expected any more


class EngineNumbers(msgspec.Struct):
    """The requests of one replica. All of it only grows."""

    histograms: dict[str, Histogram]
    finished: dict[str, int]
    prompt_tokens: int = 0
    cached_tokens: int = 0  # of them, found in the prefix cache
    generation_tokens: int = 0

    @classmethod
    def empty(cls) -> EngineNumbers:
        return cls({name: Histogram.of(bounds) for name, bounds in HISTOGRAMS.items()}, dict.fromkeys(REASONS, 0))


class MetricsSnapshot(msgspec.Struct):
    """All that `/metrics` is made of, but for what the API process itself counts. engines: by replica."""

    engines: dict[int, EngineNumbers]
    replicas: list[ReplicaNow]
    request_recovery: Histogram
    replica_recovery: Histogram
    sleep_level: int = 0  # 0: awake
    engine_restarts: int = 0  # starts of the engine's process beyond the first


@dataclass(slots=True)
class _Open:
    """A request that has not ended. Times are of the monotonic clock."""

    request: EngineRequest
    arrived_s: float
    first_s: float = 0.0  # its first token; 0 also for one that a former engine's process brought
    last_s: float = 0.0
    queued_s: float = 0.0
    tokens: int = 0
    cached: int = 0


@dataclass(slots=True)
class _Family:
    """The completions of one request, as far as they came here."""

    wanted: int
    seen: int = 0
    running: int = 0
    longest: int = 0
    last_s: float = 0.0  # when one of them last ended


class RequestMetrics:
    """Tell it of every request that the client took, and of every output it gave. One thread."""

    def __init__(self, client: EngineClient, clock: Callable[[], float] = time.monotonic, *, restarts: int = 0) -> None:
        """restarts: of the engine's process so far."""
        self._client, self._clock, self._restarts = client, clock, restarts
        self.started_s = clock()
        self.sleep_level = 0
        self._open: dict[str, _Open] = {}
        self._first = client.config.parallel.first_replica
        self._engines: dict[int, EngineNumbers] = {self._first: EngineNumbers.empty()}
        self._families: dict[str, _Family] = {}  # of requests of several completions
        self._swept_s = self.started_s
        self._firsts: deque[float] = deque(maxlen=RECENT_FIRST)
        self._betweens: deque[float] = deque(maxlen=RECENT_BETWEEN)
        self._request_recovery, self._replica_recovery = Histogram.of(WHOLE), Histogram.of(WHOLE)
        self._told = [0, 0]  # recoveries that are in these
        self._log = StatsLog(self.started_s)

    def added(self, request: EngineRequest) -> None:
        """The client took it."""
        # One that another engine's process ran: its prompt and its first token were counted there.
        self._open[request.request_id] = _Open(request, request.arrival_s or self._clock(), tokens=len(request.output_token_ids))
        if request.sampling.n > 1:
            family = self._families.setdefault(_family_name(request), _Family(request.sampling.n))
            family.seen, family.running = family.seen + 1, family.running + 1

    def took(self, outputs: Iterable[EngineOutput]) -> None:
        """The client gave these."""
        now_s = self._clock()
        for output in outputs:
            one = self._open.get(output.request_id)
            if one is None:
                continue
            numbers = self._engines.get(output.replica) or self._engines.setdefault(output.replica, EngineNumbers.empty())
            if output.new_token_ids:
                self._tokens(one, output, numbers, now_s)
            if output.finish_reason is not None:
                del self._open[output.request_id]
                self._ended(one, output, numbers, now_s)
        if now_s - self._swept_s >= INCOMPLETE_S:
            self._sweep(now_s)
        self._log.turn(now_s, self._client, self._engines)

    def _tokens(self, one: _Open, output: EngineOutput, numbers: EngineNumbers, now_s: float) -> None:
        count = len(output.new_token_ids)
        numbers.generation_tokens += count
        if one.last_s:
            between_s = now_s - one.last_s
            numbers.histograms["inter_token_latency_seconds"].observe(between_s)
            self._betweens.append(between_s)
        elif not one.tokens:  # else between it and the one before lies a restart
            first_s = now_s - one.arrived_s
            one.first_s, one.queued_s, one.cached = now_s, output.queued_s, output.num_cached_tokens
            numbers.prompt_tokens += len(one.request.prompt_token_ids)
            numbers.cached_tokens += one.cached
            numbers.histograms["time_to_first_token_seconds"].observe(first_s)
            self._firsts.append(first_s)
        one.tokens += count
        one.last_s = now_s

    def _ended(self, one: _Open, output: EngineOutput, numbers: EngineNumbers, now_s: float) -> None:
        h, request, prompt = numbers.histograms, one.request, len(one.request.prompt_token_ids)
        numbers.finished[output.finish_reason or "error"] += 1
        h["e2e_request_latency_seconds"].observe(now_s - one.arrived_s)
        h["request_prompt_tokens"].observe(prompt)
        h["request_generation_tokens"].observe(one.tokens)
        h["request_params_max_tokens"].observe(request.sampling.max_tokens or 0)
        h["request_num_preemptions"].observe(output.preemptions)
        if request.choice == 0:
            h["request_params_n"].observe(request.sampling.n)
        self._sibling_ended(one, h, now_s)
        if one.first_s:
            began_s = one.arrived_s + one.queued_s
            h["request_queue_time_seconds"].observe(one.queued_s)
            h["request_prefill_time_seconds"].observe(max(0.0, one.first_s - began_s))
            h["request_decode_time_seconds"].observe(one.last_s - one.first_s)
            h["request_inference_time_seconds"].observe(max(0.0, one.last_s - began_s))
            h["request_prefill_kv_computed_tokens"].observe(prompt - one.cached)
            if one.tokens > 1:
                h["request_time_per_output_token_seconds"].observe((one.last_s - one.first_s) / (one.tokens - 1))

    def _sibling_ended(self, one: _Open, histograms: dict[str, Histogram], now_s: float) -> None:
        """Count the longest completion of a request once all of them have ended."""
        longest = one.tokens
        if one.request.sampling.n > 1:
            name = _family_name(one.request)
            family = self._families[name]
            family.running, family.longest, family.last_s = family.running - 1, max(family.longest, longest), now_s
            if family.running or family.seen < family.wanted:
                return
            longest = self._families.pop(name).longest
        histograms["request_max_num_generation_tokens"].observe(longest)

    def _sweep(self, now_s: float) -> None:
        """Count the families the rest of which does not come: it ended in a former engine's process, or was refused."""
        self._swept_s = now_s
        for name, family in list(self._families.items()):
            if not family.running and now_s - family.last_s >= INCOMPLETE_S:
                del self._families[name]
                self._engines[self._first].histograms["request_max_num_generation_tokens"].observe(family.longest)

    def snapshot(self) -> MetricsSnapshot:
        """The numbers of this moment."""
        found = self._client.recoveries()
        for i, (seconds, into) in enumerate(
            ((found.requests_s, self._request_recovery), (found.replicas_s, self._replica_recovery)),
        ):
            for value in seconds[self._told[i] :]:
                into.observe(value)
            self._told[i] = len(seconds)
        recoveries = self._request_recovery, self._replica_recovery
        return MetricsSnapshot(self._engines, self._client.live(), *recoveries, self.sleep_level, self._restarts)

    def cluster(self) -> dict[str, Any]:
        """The replicas and ranks as `/v1/cluster` has them, less the model's name."""
        parallel = self._client.config.parallel
        return cluster_view(
            self._client.live(),
            shape={
                "tp": parallel.tensor_parallel_size,
                "pp": parallel.pipeline_parallel_size,
                "dp": parallel.replicas_served,
            },
            uptime_s=self._clock() - self.started_s,
            requests=sum(sum(numbers.finished.values()) for numbers in self._engines.values()),
            firsts_s=self._firsts,
            betweens_s=self._betweens,
        )


def _family_name(request: EngineRequest) -> str:
    """What all completions of a request share."""
    return request.request_id.rpartition(".")[0]
