"""A replica under load: time to first token, time per output token and the rate it carries, by how many requests it runs at once.

    TPOT(B) = step overhead + round(B) + interference * B / output_len * occupancy * stalls(B)
    TTFT(B) = arrival + prefill_scale * prefill + beside(B) + queue * B * occupancy
    rate(B) = B / (TTFT(B) + (output_len - 1) * TPOT(B))                       (Little's law)

round: until every running request has one more token. Under PP the requests are in m = min(p, B) micro-batches, and steady
decode keeps the slowest stage busy min(1, m / p) of the time: no fill and drain. occupancy: how long a prompt keeps the
slowest stage busy. prefill: fill and drain of its chunks. The constants are in docs/planner.md#serving.
"""

from __future__ import annotations

import math
from copy import copy
from dataclasses import dataclass

from lockstep.planner.layer import Work
from lockstep.planner.layout import Layout
from lockstep.planner.step import Pricer, Step
from lockstep.planner.terms import Term

SERVING = "docs/planner.md#serving"


@dataclass(frozen=True)
class Serving:
    """The engine's own constants; `lockstep calibrate` fits them. The defaults are those of a GPU server with nothing fitted."""

    step_overhead_s: float = 0.0
    interference: float = 1.0
    arrival_s: float = 0.030
    queue: float = 0.05
    prefill_scale: float = 1.0
    calibrated: bool = False


@dataclass(frozen=True)
class Workload:
    """What is asked: tokens per request, requests per second, and the latencies promised (None: any)."""

    input_len: int
    output_len: int
    rate: float | None = None
    ttft_s: float | None = None
    tpot_s: float | None = None
    margin: float = 0.0  # the share by which predictions must stay below the latencies promised
    max_model_len: int | None = None

    @property
    def tokens(self) -> int:
        """Tokens of a request at its end."""
        return self.input_len + self.output_len

    @property
    def longest(self) -> int:
        """Tokens of the longest request that is let in."""
        return self.max_model_len or self.tokens

    @property
    def ttft_limit_s(self) -> float:
        """What a predicted TTFT must not exceed: the promise less the margin; infinite where any will do."""
        return math.inf if self.ttft_s is None else self.ttft_s * (1 - self.margin)

    @property
    def tpot_limit_s(self) -> float:
        """The same of TPOT."""
        return math.inf if self.tpot_s is None else self.tpot_s * (1 - self.margin)

    @property
    def decode_context(self) -> float:
        """Cached tokens of a running request, on average."""
        return self.input_len + self.output_len / 2

    def misses(self, point: Point) -> list[str]:
        """Which promises `point` breaks."""
        found = ["ttft"] if point.ttft_s > self.ttft_limit_s else []
        return found + (["tpot"] if point.tpot_s > self.tpot_limit_s else [])


@dataclass(frozen=True)
class Point:
    """One replica that runs `concurrency` requests at once."""

    concurrency: int
    ttft_s: float
    tpot_s: float
    rate: float  # requests per second


class Replica:
    """One replica of a layout, prompts cut into chunks of at most `chunk` tokens."""

    def __init__(self, pricer: Pricer, layout: Layout, work: Workload, chunk: int, serving: Serving) -> None:
        self.pricer, self.layout, self.work, self.serving = pricer, layout, work, serving
        self.chunks = -(-work.input_len // chunk)
        size = -(-work.input_len // self.chunks)
        self.prompt = Work(False, size, (self.chunks - 1) * size / 2)
        step = pricer.step(layout, self.prompt)
        self.prefill_s = step.drain_s(self.chunks)
        self.occupancy_s = self.chunks * step.beat_s
        self.longest_gap_s = step.beat_s  # what a running request may wait for a chunk of another one

    def with_serving(self, serving: Serving) -> Replica:
        """The same replica behind an engine with other constants."""
        other = copy(self)
        other.serving = serving
        return other

    def in_flight(self, concurrency: int) -> tuple[int, int]:
        """(micro-batches, requests in each) of so many running requests."""
        m = min(self.layout.pp, concurrency)
        return m, -(-concurrency // m)

    def decode(self, concurrency: int) -> Work:
        return Work(True, self.in_flight(concurrency)[1], self.work.decode_context)

    def beside_s(self, decode: Step) -> float:
        """What running requests add to a prompt: every step that computes a part of it computes a token for each of them."""
        return (self.chunks + self.layout.pp - 1) * decode.beat_s

    def others_s(self, concurrency: int) -> float:
        """What prompts of other requests add to each output token, if every chunk delays everybody once (interference 1).

        In a pipeline a chunk delays more than its own stage: the step that carries it holds all p stages up, one after the other,
        unless the steps around it carry chunks too. Of p steps in a row one at least has a chunk with probability 1 - (1 - x)^p,
        x being the chunks per step. Chunks of one prompt follow each other and share the holes, though not all of them: the root
        of their number is what the event simulation shows.
        """
        m, _ = self.in_flight(concurrency)
        x = min(1.0, concurrency * self.chunks / (self.work.output_len * m))
        stalls = 1 + ((1 - (1 - x) ** self.layout.pp) / x - 1) / math.sqrt(self.chunks)
        return concurrency / self.work.output_len * self.occupancy_s * stalls

    def at(self, concurrency: int) -> Point:
        """What so many requests at once see, and the rate that they make."""
        m, _ = self.in_flight(concurrency)
        step, s = self.pricer.step(self.layout, self.decode(concurrency)), self.serving
        round_s = step.round_s(m)
        tpot = s.step_overhead_s + round_s + s.interference * self.others_s(concurrency)
        ttft = s.arrival_s + s.prefill_scale * self.prefill_s + self.beside_s(step) + s.queue * concurrency * self.occupancy_s
        return Point(concurrency, ttft, tpot, concurrency / (ttft + (self.work.output_len - 1) * tpot))

    def tpot_terms(self, concurrency: int) -> list[Term]:
        """What `at(concurrency).tpot_s` is made of."""
        s, (m, _) = self.serving, self.in_flight(concurrency)
        step = self.pricer.step(self.layout, self.decode(concurrency))
        others = s.interference * self.others_s(concurrency)
        terms = [
            *self.pricer.terms(self.layout, self.decode(concurrency)),
            _term("waiting for the slowest stage", step.round_s(m) - step.sum_s, "max(0, m * slowest stage - sum of stages)"),
            _term("prefill of other requests", others, "interference * B / output_len * occupancy * stalls"),
            _term("step overhead", s.step_overhead_s, "constant"),
        ]
        return [t for t in terms if t.seconds]

    def ttft_terms(self, concurrency: int) -> list[Term]:
        """What `at(concurrency).ttft_s` is made of."""
        s = self.serving
        step: Step = self.pricer.step(self.layout, self.prompt)
        running = self.beside_s(self.pricer.step(self.layout, self.decode(concurrency)))
        terms = [
            *(t.times(self.chunks) for t in self.pricer.terms(self.layout, self.prompt)),
            _term(
                "overlap of chunks over stages", self.prefill_s - self.chunks * step.sum_s, "sum + (n-1) slowest - n sum (fill and drain)"
            ),
            _term("running requests in the same steps", running, "(chunks + p - 1) * slowest stage of a decode step"),
            _term("queue", s.queue * concurrency * self.occupancy_s, "queue * B * occupancy"),
            _term("prefill beyond its own steps", (s.prefill_scale - 1) * self.prefill_s, "(scale - 1) * prefill"),
            _term("arrival", s.arrival_s, "constant"),
        ]
        return [t for t in terms if t.seconds]

    def utilisation(self, concurrency: int) -> float:
        """Of the time, that a stage works in steady decode: min(1, m / p)."""
        return min(1.0, self.in_flight(concurrency)[0] / self.layout.pp)


def _term(name: str, seconds: float, formula: str) -> Term:
    return Term(name, seconds, formula=formula, source=SERVING)
