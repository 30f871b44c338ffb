"""A replica under load: time to first token, time per output token and the rate it carries, by how many requests it runs at once.

    TPOT(B) = step overhead + round(B) + interference * B / output_len * occupancy(B) * stalls(B)
    TTFT(B) = arrival + prefill_scale * prefill(B) + beside(B) + queue(B)
    rate(B) = B / (TTFT(B) - arrival + (output_len - 1) * TPOT(B))             (Little's law)
              and no more than 1 / (occupancy(B) + (output_len - 1) * round(B) / B)

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
NO_LIMIT = 1 << 30
FULLEST = 8  # prompts of a step: with more, steps are alike


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
    def streams(self) -> bool:
        """Whether an answer has a time between tokens: not where it is one token."""
        return self.output_len > 1

    @property
    def longest(self) -> int:
        """Tokens of the longest request that is let in."""
        return self.tokens if self.max_model_len is None else self.max_model_len

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
        return found + (["tpot"] if self.streams and point.tpot_s > self.tpot_limit_s else [])

    def excess(self, point: Point) -> tuple[float, float]:
        """Predicted TTFT and TPOT over what was promised less the margin; 0 for what was not asked for."""
        return point.ttft_s / self.ttft_limit_s, point.tpot_s / self.tpot_limit_s if self.streams else 0.0


@dataclass(frozen=True)
class Point:
    """One replica that runs `concurrency` requests at once."""

    concurrency: int
    ttft_s: float
    tpot_s: float
    rate: float  # requests per second


class Replica:
    """One replica of a layout, prompts cut into chunks of at most `chunk` tokens; short prompts share a step."""

    uneven = True  # whether steps with more prompts than others hold a pipeline up

    def __init__(self, pricer: Pricer, layout: Layout, work: Workload, chunk: int, serving: Serving) -> None:
        self.pricer, self.layout, self.work, self.serving = pricer, layout, work, serving
        self.chunk, self.chunks = chunk, -(-work.input_len // chunk)
        self.together = max(1, chunk // work.input_len)  # prompts that a step may hold
        size = -(-work.input_len // self.chunks)
        self.prompt = Work(False, size, (self.chunks - 1) * size / 2)
        step = pricer.step(layout, self.prompt)
        self.prefill_s = step.drain_s(self.chunks)
        self.beat_s = step.beat_s  # of the slowest stage, for a chunk

    def with_serving(self, serving: Serving) -> Replica:
        """The same replica behind an engine with other constants."""
        other = copy(self)
        other.serving = serving
        return other

    def in_flight(self, concurrency: int) -> tuple[int, int]:
        """(micro-batches, requests in the largest) of so many running requests."""
        m = min(self.layout.pp, concurrency)
        return m, -(-concurrency // m)

    def decode(self, concurrency: int) -> Work:
        return Work(True, self.in_flight(concurrency)[1], self.work.decode_context)

    @property
    def most(self) -> int:
        """Requests at once beyond which every step is full of prompts already: more would wait, and carry nothing."""
        out = self.work.output_len
        return max(self.layout.pp, out * self.layout.pp * self.together // self.chunks) if out > 1 else NO_LIMIT

    def round_s(self, concurrency: int) -> float:
        """Until each running request has one more token, if there were no prompts."""
        m, most = self.in_flight(concurrency)
        largest = self.pricer.step(self.layout, self.decode(concurrency))
        rest = m * most - concurrency  # micro-batches with a request less
        smaller = self.pricer.step(self.layout, Work(True, most - 1, self.work.decode_context)).beat_s if rest else 0.0
        return max(largest.sum_s, (m - rest) * largest.beat_s + rest * smaller)

    def chunks_per_step(self, concurrency: int) -> float:
        """Chunks of new prompts in each step, on average: every request is one after `output_len` rounds."""
        return concurrency * self.chunks / (self.work.output_len * self.in_flight(concurrency)[0])

    def prompts_s(self, chunks: float) -> float:
        """What so many chunks in a step cost the slowest stage. Whole prompts that share a step read the weights once."""
        if chunks <= 1 or self.together == 1:
            return chunks * self.beat_s
        low = min(self.together, math.floor(chunks))
        if low == self.together:
            return chunks / low * self._shared_s(low)
        return self._shared_s(low) + (chunks - low) * (self._shared_s(low + 1) - self._shared_s(low))

    def _shared_s(self, prompts: int) -> float:
        """The slowest stage's time for `prompts` whole prompts in one step."""
        return self.pricer.step(self.layout, Work(False, prompts * self.work.input_len, 0.0, prompts)).beat_s

    def occupancy_s(self, concurrency: int) -> float:
        """How long each prompt keeps the slowest stage busy."""
        x = self.chunks_per_step(concurrency)
        return self.chunks * self.prompts_s(x) / x

    def abreast(self, concurrency: int) -> int:
        """Chunks that fit a step: its limit leaves room for a token of every running request, of which only some are in it."""
        if self.together > 1:
            return self.together
        elsewhere = concurrency - self.in_flight(concurrency)[1]
        return max(1, round(max(self.chunk, elsewhere) / self.prompt.tokens))

    def stalls(self, concurrency: int) -> float:
        """How often a chunk delays running requests, times its own stage: once without a pipeline, up to p times with one.

        The step that carries it holds all p stages up, one after the other, unless the steps around it carry chunks too. Of p
        steps in a row one at least has a chunk with probability 1 - (1 - x)^p, x being the chunks per step. Chunks of one prompt
        follow each other and share the holes, though not all of them: the root of their number is what the event simulation shows.

        Where K prompts or chunks fit a step, steps with two hold up those with one: the p in a row take as long as p times the fullest.
        Of that the simulation shows a share of 1 / K^1.5: the more there are the more alike steps become.
        """
        p, k = self.layout.pp, self.abreast(concurrency)
        x = min(float(k), self.chunks_per_step(concurrency))
        once = (held_up(min(1.0, x), 1, p) - 1) / math.sqrt(self.chunks)
        return 1 + (max(once, (held_up(x, k, p) - 1) / k**1.5) if self.uneven and k > 1 and p > 1 else once)

    def others_s(self, concurrency: int) -> float:
        """What prompts of other requests add to each output token, if every chunk delays everybody (interference 1)."""
        return concurrency / self.work.output_len * self.occupancy_s(concurrency) * self.stalls(concurrency)

    def beside_s(self, concurrency: int) -> float:
        """What running requests add to a prompt: every step that computes a part of it computes a token for each of them."""
        if self.work.output_len == 1:
            return 0.0
        return (self.chunks + self.layout.pp - 1) * self.pricer.step(self.layout, self.decode(concurrency)).beat_s

    def prompt_s(self, concurrency: int) -> float:
        """Fill and drain of a prompt's chunks, with the prompts that share its step."""
        x = min(float(self.together), max(1.0, self.chunks_per_step(concurrency)))
        return self.prefill_s + self.prompts_s(x) - self.beat_s

    def queue_s(self, concurrency: int, tpot_s: float) -> float:
        """How long a prompt waits for those before it. At a given rate they come at random (Poisson), and a queue with steady
        service times forms (M/D/1); without one, requests come when others end, and the constant is that of measured servers."""
        if self.work.rate is None:
            return self.serving.queue * concurrency * self.occupancy_s(concurrency)
        decode = self.beside_s(concurrency) / (self.chunks + self.layout.pp - 1)
        service = self.chunks * (self.prompts_s(self.together) + decode) / self.together
        alone = self.prompt_s(concurrency) + self.beside_s(concurrency) + (self.work.output_len - 1) * tpot_s
        busy = busy_share(concurrency, alone / service)
        return busy / (2 * (1 - busy)) * service

    def waiting(self) -> tuple[str, str]:
        """(name, formula) of `queue_s` among the terms."""
        if self.work.rate is None:
            return "queue", "queue * B * occupancy"
        return "waiting for prompts before it", "rho / (2 (1 - rho)) * service"

    def at(self, concurrency: int) -> Point:
        """What so many requests at once see, and the rate that they make."""
        s, out = self.serving, self.work.output_len
        round_s = self.round_s(concurrency)
        tpot = s.step_overhead_s + round_s + s.interference * self.others_s(concurrency)
        ttft = s.arrival_s + s.prefill_scale * self.prompt_s(concurrency) + self.beside_s(concurrency) + self.queue_s(concurrency, tpot)
        little = concurrency / (ttft - s.arrival_s + (out - 1) * tpot)
        return Point(concurrency, ttft, tpot, min(little, 1 / (self.occupancy_s(concurrency) + (out - 1) * round_s / concurrency)))

    def longest_gap_s(self, concurrency: int) -> float:
        """What a running request may wait for a token: a step full of prompts, through all stages, and the round of all others."""
        full = self.prompt if self.together == 1 else Work(False, self.together * self.work.input_len, 0.0, self.together)
        return self.pricer.step(self.layout, full).sum_s + self.round_s(concurrency)

    def tpot_terms(self, concurrency: int) -> list[Term]:
        """What `at(concurrency).tpot_s` is made of."""
        s, decode = self.serving, self.decode(concurrency)
        waiting = self.round_s(concurrency) - self.pricer.step(self.layout, decode).sum_s
        others = s.interference * self.others_s(concurrency)
        terms = [
            *self.pricer.terms(self.layout, decode),
            _term("waiting for the slowest stage", waiting, "max(0, slowest stage of each micro-batch - sum of stages)"),
            _term("prefill of other requests", others, "interference * B / output_len * occupancy * stalls"),
            _term("step overhead", s.step_overhead_s, "constant"),
        ]
        return [t for t in terms if t.seconds]

    def ttft_terms(self, concurrency: int) -> list[Term]:
        """What `at(concurrency).ttft_s` is made of."""
        s = self.serving
        step: Step = self.pricer.step(self.layout, self.prompt)
        prompt, tpot = self.prompt_s(concurrency), self.at(concurrency).tpot_s
        terms = [
            *(t.times(self.chunks) for t in self.pricer.terms(self.layout, self.prompt)),
            _term(
                "overlap of chunks over stages", self.prefill_s - self.chunks * step.sum_s, "sum + (n-1) slowest - n sum (fill and drain)"
            ),
            _term("prompts in the same step", prompt - self.prefill_s, "step with x prompts - step with one"),
            _term("running requests in the same steps", self.beside_s(concurrency), "(chunks + p - 1) * slowest stage of a decode step"),
            _term(self.waiting()[0], self.queue_s(concurrency, tpot), self.waiting()[1]),
            _term("prefill beyond its own steps", (s.prefill_scale - 1) * prompt, "(scale - 1) * prefill"),
            _term("arrival", s.arrival_s, "constant"),
        ]
        return [t for t in terms if t.seconds]

    def utilisation(self, concurrency: int) -> float:
        """Of the time, that a stage works in steady decode: min(1, m / p)."""
        return min(1.0, self.in_flight(concurrency)[0] / self.layout.pp)


def held_up(x: float, most: int, stages: int) -> float:
    """The fullest of `stages` steps over the mean, each with up to `most` prompts, x on average (binomial)."""
    k = min(most, FULLEST)
    share, below, found = min(1.0, x / k), 0.0, 0.0
    for prompts in range(k):
        below += math.comb(k, prompts) * share**prompts * (1 - share) ** (k - prompts)
        found += 1 - min(1.0, below) ** stages
    return found / x


def busy_share(present: float, stay: float) -> float:
    """How much of the time an M/D/1 queue's server is busy, rho, when on average `present` customers wait, are served, or stay
    on: each stays `stay` service times besides its waiting. present = rho stay + rho^2 / (2 (1 - rho)), solved for rho < 1."""
    a, b = 1 - 2 * stay, 2 * (stay + present)
    return 4 * present / (b + math.sqrt(b * b + 8 * a * present))


def _term(name: str, seconds: float, formula: str) -> Term:
    return Term(name, seconds, formula=formula, source=SERVING)
