"""Data parallelism: replicas behind a router, and what the router's rule is worth under load.

A replica computes prompts one after the other, 20,000 tokens a second, and then gives every request a token each 10 ms. A prompt
waits until its tokens and its answer's have room among the 16,000 that a replica holds. A replica keeps the system prompts that
it used last, and a prompt that begins with one of them has so much less to compute. Requests arrive at random (Poisson), lengths
are skewed, and so is which system prompt they begin with. The rule is handed in as a function of what the router knows,
which may be old: with several routers, or reports now and then, it always is.
"""

from __future__ import annotations

import heapq
import random
from collections import OrderedDict, deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from lockstep.config.tree import opt
from lockstep.planner.teach.checks import within
from lockstep.planner.teach.svg import Axis, Canvas, Series, chart
from lockstep.planner.teach.table import percent, table, time_text

TOKENS_PER_S = 20_000.0  # prompt tokens of one replica
TOKEN_S = 0.01  # between two tokens of a request
KV_TOKENS = 16_000  # room of one replica
LONGEST_OWN, LONGEST_OUTPUT = 4096, 256
WARM_SHARE = 0.2  # of the requests, not counted: the replicas begin empty
LOADS = (0.4, 0.6, 0.8, 1.0, 1.2)  # of the picture
FEWER = 3  # the picture's runs have so many times fewer requests than the table's


@dataclass(frozen=True)
class Options:
    """The replicas, and the load."""

    replicas: int = opt(8, "Replicas, all alike.", "-dp")
    load: float = opt(0.8, "Prompt tokens offered, as a share of what the replicas can compute if nothing is cached.")
    requests: int = opt(1200, "Requests in all.")
    prefixes: int = opt(40, "System prompts; the k-th most popular begins 1/k as many requests as the first.")
    cached: int = opt(6, "System prompts that a replica keeps.")
    stale_ms: float = opt(0.0, "How old the router's knowledge of the replicas may be.")
    seed: int = opt(0, "Of the load, and of what routers draw.")

    def check(self) -> None:
        """Raises ConfigError for a load that cannot be."""
        for name, least, most in (
            ("replicas", 1, 256), ("load", 0.01, 2), ("requests", 20, 20_000), ("prefixes", 1, 1000), ("cached", 0, 1000),
            ("stale_ms", 0, 60_000),
        ):  # fmt: skip
            within(name, getattr(self, name), least, most)


@dataclass(frozen=True, slots=True)
class Request:
    """One request: its prompt is a system prompt of `shared_tokens` and `own_tokens` more."""

    arrival_s: float
    prefix: int
    shared_tokens: int
    own_tokens: int
    output_tokens: int

    @property
    def prompt_tokens(self) -> int:
        return self.shared_tokens + self.own_tokens

    @property
    def tokens(self) -> int:
        """All it will hold."""
        return self.prompt_tokens + self.output_tokens


@dataclass(frozen=True, slots=True)
class View:
    """What a router knows of one replica: prompt tokens to compute, tokens held by running requests, requests not ended."""

    waiting_tokens: int = 0
    running_tokens: int = 0
    requests: int = 0


# (what is known of every replica, the prompt's tokens cached on each, how many requests came before) -> the chosen replica
Choose = Callable[[Sequence[View], Sequence[int], int], int]
Policy = Callable[[int], Choose]  # made anew from the seed for each run


@dataclass
class Replica:
    """One simulated replica. `take` and `look` move its clock forward; it never goes back."""

    free_s: float = 0.0  # when the last prompt given to it is computed
    room: list[tuple[float, int]] = field(default_factory=list)  # heap of (end, tokens) of all whose room is not reused
    reserved: int = 0  # tokens in `room`
    queue: deque[tuple[float, int, Request]] = field(default_factory=deque)  # (when its prompt is computed, tokens of it, it)
    waiting: int = 0  # tokens in `queue`
    running: list[tuple[float, int]] = field(default_factory=list)  # heap of (end, tokens) of those whose prompts are computed
    held: int = 0  # tokens in `running`
    cache: OrderedDict[int, int] = field(default_factory=OrderedDict)  # prefix -> tokens, least recently used first

    def look(self, now: float) -> View:
        """What it carries."""
        while self.queue and self.queue[0][0] <= now:
            first_s, computed, one = self.queue.popleft()
            self.waiting -= computed
            heapq.heappush(self.running, (first_s + TOKEN_S * one.output_tokens, one.tokens))
            self.held += one.tokens
        while self.running and self.running[0][0] <= now:
            self.held -= heapq.heappop(self.running)[1]
        return View(self.waiting, self.held, len(self.queue) + len(self.running))

    def take(self, request: Request, keep: int) -> tuple[float, int]:
        """Queue a request; (seconds until its first token, prompt tokens found cached)."""
        hit = min(self.cache.pop(request.prefix, 0), request.prompt_tokens - 1)
        self.cache[request.prefix] = request.shared_tokens
        while len(self.cache) > keep:
            self.cache.popitem(last=False)
        start = max(self.free_s, request.arrival_s)
        while self.room and (self.room[0][0] <= start or self.reserved + request.tokens > KV_TOKENS):
            end, tokens = heapq.heappop(self.room)
            start, self.reserved = max(start, end), self.reserved - tokens
        computed = request.prompt_tokens - hit
        self.free_s = start + computed / TOKENS_PER_S
        heapq.heappush(self.room, (self.free_s + TOKEN_S * request.output_tokens, request.tokens))
        self.reserved += request.tokens
        self.queue.append((self.free_s, computed, request))
        self.waiting += computed
        return self.free_s - request.arrival_s, hit


@dataclass(frozen=True)
class Outcome:
    """What one rule came to."""

    policy: str
    ttft_p50_s: float
    ttft_p99_s: float
    max_over_mean: float  # tokens carried by the fullest replica over the mean, averaged over the arrivals
    hit_share: float  # of all prompt tokens


@dataclass(frozen=True)
class Result:
    """Every rule at the load that was asked for, and over a range of loads."""

    options: Options
    outcomes: tuple[Outcome, ...]
    by_load: tuple[tuple[float, tuple[Outcome, ...]], ...]


def requests(options: Options) -> list[Request]:
    """The load: Poisson arrivals, Zipf-popular system prompts of 256 to 1024 tokens, own prompts and outputs with a long tail."""
    o, draw = options, random.Random(options.seed)
    lengths = [draw.randrange(256, 1025) for _ in range(o.prefixes)]
    popular = [1 / place for place in range(1, o.prefixes + 1)]
    made = []
    for _ in range(o.requests):
        prefix = draw.choices(range(o.prefixes), popular)[0]
        own = min(LONGEST_OWN, int(32 * draw.paretovariate(0.8)))
        made.append(Request(0.0, prefix, lengths[prefix], own, min(LONGEST_OUTPUT, int(16 * draw.paretovariate(0.9)))))
    rate = o.load * o.replicas * TOKENS_PER_S * len(made) / sum(one.prompt_tokens for one in made)
    now, found = 0.0, []
    for one in made:
        now += draw.expovariate(rate)
        found.append(replace(one, arrival_s=now))
    return found


def route(policy: str, choose: Choose, load: Sequence[Request], options: Options) -> Outcome:
    """Play the load through one rule."""
    replicas = [Replica() for _ in range(options.replicas)]
    views: list[View] = []
    seen_s, waits, ratios, hits, prompt = -1e9, [], [], 0, 0
    for number, one in enumerate(load):
        true = [r.look(one.arrival_s) for r in replicas]
        if not views or one.arrival_s - seen_s >= options.stale_ms / 1e3:
            views, seen_s = true, one.arrival_s
        to = choose(views, [r.cache.get(one.prefix, 0) for r in replicas], number)
        wait, hit = replicas[to].take(one, options.cached)
        if number >= WARM_SHARE * len(load):
            carried = [view.waiting_tokens + view.running_tokens for view in true]
            ratios.append(max(carried) * len(carried) / max(1, sum(carried)))
            waits.append(wait)
            hits, prompt = hits + hit, prompt + one.prompt_tokens
    waits.sort()
    p50, p99 = (waits[min(len(waits) - 1, int(share * len(waits)))] for share in (0.5, 0.99))
    return Outcome(policy, p50, p99, sum(ratios) / len(ratios), hits / prompt)


def simulate(options: Options, policies: Mapping[str, Policy]) -> Result:
    """Every rule over the same load, and over a range of loads. Raises ConfigError for impossible settings."""
    options.check()

    def at(o: Options) -> tuple[Outcome, ...]:
        load = requests(o)
        return tuple(route(name, policy(o.seed), load, o) for name, policy in policies.items())

    fewer = replace(options, requests=max(20, options.requests // FEWER))
    return Result(options, at(options), tuple((share, at(replace(fewer, load=share))) for share in LOADS))


def report(result: Result) -> str:
    """The rules at the load asked for, then the slowest hundredth over the loads."""
    o = result.options
    rows = [
        (x.policy, time_text(x.ttft_p50_s), time_text(x.ttft_p99_s), f"{x.max_over_mean:.2f}", percent(x.hit_share))
        for x in result.outcomes
    ]
    names = [x.policy for x in result.outcomes]
    curve = [(f"{share:g}", *(time_text(x.ttft_p99_s) for x in outcomes)) for share, outcomes in result.by_load]
    return "\n".join(
        [
            f"{o.requests} requests over {o.replicas} replicas at {o.load:g} of what they can compute with nothing cached",
            f"the router's knowledge is {_known(o)}",
            "",
            table(("rule", "TTFT p50", "TTFT p99", "max / mean tokens", "prompt tokens cached"), rows),
            "",
            f"TTFT p99 by load ({max(20, o.requests // FEWER)} requests each)",
            table(("load", *names), curve),
        ]
    )


def _known(options: Options) -> str:
    return "always up to date" if options.stale_ms == 0 else f"up to {options.stale_ms:g} ms old"


def picture(result: Result) -> str:
    """The slowest hundredth of the first tokens, by load, one line for each rule."""
    canvas = Canvas(760, 380, f"Routing over {result.options.replicas} replicas, by knowledge {_known(result.options)}")
    names = [x.policy for x in result.outcomes]
    series = [Series(name, [(share, outcomes[i].ttft_p99_s) for share, outcomes in result.by_load]) for i, name in enumerate(names)]
    across = Axis("offered load", LOADS[0], LOADS[-1], [(share, f"{share:g}") for share in LOADS])
    up = Axis("s", 0.03, 30.0, [(value, f"{value:g}") for value in (0.03, 0.1, 0.3, 1, 3, 10, 30)], log=True)
    chart(canvas, 70, 70, 480, 240, "Time to first token, 99th percentile", across, up, series)
    return canvas.svg()
