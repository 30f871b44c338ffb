"""Routing over data-parallel replicas, simulated: how fast the router decides, how even the load is, how many prefixes hit.

    python benchmarks/router.py [--replicas 64] [--rate 10000] [--seconds 10] [--load FILE | --generate] [--record FILE] [--json]

The router is the real one (`lockstep.cluster`); the replicas are not. Each serves a fixed number of tokens per second in steps of
20 ms: one token for every running sequence, then prompts in their order, with a prefix cache of its own that forgets what was
used least recently. What a replica says (first tokens, ends, and every 100 ms a report) reaches the router one step later.

`decisions_per_s` is the wall time of choosing a replica and noting the choice, prompt hashing included, on one thread;
`decisions_per_cpu_s` is the same of this thread's processor time, which other load on the machine leaves alone; `router_us` is
processor time per request with everything the replicas say. `max_over_mean` is the tokens that the fullest replica truly holds
and has waiting, over the mean of all: its average and its worst over the steps after the first fifth. `prefix_hit_share` is the
share of the prompt tokens found cached; no cache at all is 0, and all system prompts known everywhere `possible`.
The load is a recording (benchmarks/data/router_load.jsonl, or another as --record writes them), played over and over at the
rate; with --generate it is made for the occasion (benchmarks/router_load.py).
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import sys
import time
from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import router_load
from router_load import Prompts, Request, prefix_length

from lockstep.cluster import balance
from lockstep.cluster.load_book import LoadBook
from lockstep.cluster.prefix_index import PrefixIndex

RECORDED = Path(__file__).resolve().parent / "data" / "router_load.jsonl"
STEP_S = 0.02
REPORT_STEPS = 5
TOKENS_PER_S = 130_000  # of one replica: with no prefix hit at all, the usual load asks for seven tenths of it
MAX_RUNNING = 1024
CACHE_TOKENS = 65_536  # what a replica keeps for later requests
WARM_SHARE = 0.2  # of the run, not counted in the averages
POLICIES = ("round_robin", "shortest_queue", "prefix_affine", "sticky")


@dataclass(slots=True)
class Routed:
    """A request on its replica. Written by the replica."""

    name: str
    request: Request
    ticket: int
    hit: int = 0  # prompt tokens found cached
    left: int = -1  # prompt tokens to compute; -1 before it began


class Replica:
    """One simulated engine."""

    def __init__(self, say: Callable[..., None]) -> None:
        self.say = say  # (method of LoadBook, its arguments)
        self.queue: deque[Routed] = deque()
        self.ends: defaultdict[int, list[Routed]] = defaultdict(list)  # by step
        self.cache: OrderedDict[Any, int] = OrderedDict()  # entry -> tokens, least recently used first
        self.cached = self.waiting = self.held = self.running = self.newest = 0

    def take(self, routed: Routed) -> None:
        self.queue.append(routed)
        self.waiting += routed.request.prompt_tokens
        self.newest = routed.ticket

    def step(self, now: int) -> list[Routed]:
        """One step; returns the requests whose first token it made."""
        for ended in self.ends.pop(now, ()):
            self.running -= 1
            self.held -= ended.request.prompt_tokens + ended.request.output_tokens
            self.say("finish", ended.name, ended.request.output_tokens)
        self.held += self.running
        budget = int(TOKENS_PER_S * STEP_S) - self.running
        first = []
        while budget > 0 and self.queue and self.running < MAX_RUNNING:
            head = self.queue[0]
            if head.left < 0:
                head.hit = min(self._find(head.request.prefix_id), head.request.prompt_tokens - 1)
                head.left = head.request.prompt_tokens - head.hit
                self._compute(head.hit)
            done = min(budget, head.left)
            self._compute(done)
            head.left -= done
            budget -= done
            if not head.left:
                self._start(self.queue.popleft(), now)
                first.append(head)
        return first

    def _start(self, routed: Routed, now: int) -> None:
        """The prompt is computed: its first token is out, its blocks are cached."""
        request = routed.request
        self.running += 1
        self.held += 1
        self.ends[now + request.output_tokens].append(routed)
        shared = min(prefix_length(request.prefix_id), request.prompt_tokens)
        self._keep(routed.name, request.prompt_tokens - shared)
        self._keep(request.prefix_id, shared)
        self.say("progress", routed.name, request.prompt_tokens, 1)

    def _compute(self, tokens: int) -> None:
        self.waiting -= tokens
        self.held += tokens

    def _find(self, prefix_id: int) -> int:
        if prefix_id in self.cache:
            self.cache.move_to_end(prefix_id)
        return self.cache.get(prefix_id, 0)

    def _keep(self, entry: Any, tokens: int) -> None:
        self.cached += tokens - self.cache.pop(entry, 0)
        self.cache[entry] = tokens
        while self.cached > CACHE_TOKENS:
            self.cached -= self.cache.popitem(last=False)[1]


class Router:
    """The real book, index and policy, and the time they take."""

    def __init__(self, policy: str, replicas: int) -> None:
        self.policy = policy
        self.book = LoadBook(replicas)
        self.index = PrefixIndex(replicas, blocks_per_replica=CACHE_TOKENS // 32)
        self.count = 0
        self.wall_s = self.cpu_s = self.news_cpu_s = 0.0

    def route(self, name: str, request: Request, tokens: list[int]) -> tuple[int, int]:
        """The replica, and the request's ticket there."""
        cpu, wall = time.thread_time(), time.perf_counter()
        cached, loads = 0, self.book.loads
        if self.policy == "prefix_affine":
            names = self.index.names(tokens)
            matches = self.index.matches(tokens, names)
            replica = balance.prefix_affine(loads, matches, start=self.count)
            self.index.insert(tokens, replica, names)
            cached = matches[replica]
        elif self.policy == "sticky":
            replica = balance.sticky(request.session, loads)
        elif self.policy == "shortest_queue":
            replica = balance.shortest_queue(loads, start=self.count)
        else:
            replica = balance.round_robin(loads, start=self.count)
        ticket = self.book.start(name, replica, request.prompt_tokens, cached_tokens=cached)
        self.wall_s += time.perf_counter() - wall
        self.cpu_s += time.thread_time() - cpu
        self.count += 1
        return replica, ticket

    def hear(self, news: list[tuple[Any, ...]]) -> None:
        """What the replicas said, in its order."""
        cpu = time.thread_time()
        for method, *arguments in news:
            getattr(self.book, method)(*arguments)
        self.news_cpu_s += time.thread_time() - cpu


def simulate(policy: str, requests: list[Request], replica_count: int, seed: int) -> dict[str, Any]:
    """Run the load through one policy until its last arrival, and sum up."""
    router = Router(policy, replica_count)
    news: list[tuple[Any, ...]] = []
    replicas = [Replica(lambda *said: news.append(said)) for _ in range(replica_count)]
    steps = int(requests[-1].arrival_s / STEP_S) + 1
    arriving = zip(requests, Prompts(seed).of(requests), strict=True)
    pending = next(arriving, None)
    ratios, waits_s, hit, prompt = [], [], 0, 0
    for now in range(steps):
        while pending and pending[0].arrival_s < (now + 1) * STEP_S:
            name = f"r{router.count}"
            to, ticket = router.route(name, *pending)
            replicas[to].take(Routed(name, pending[0], ticket))
            pending = next(arriving, None)
        router.hear(news)  # of the step before
        news.clear()
        for i, replica in enumerate(replicas):
            for first in replica.step(now):
                waits_s.append((now + 1) * STEP_S - first.request.arrival_s)
                hit, prompt = hit + first.hit, prompt + first.request.prompt_tokens
            if now % REPORT_STEPS == REPORT_STEPS - 1:
                unfinished = replica.running + len(replica.queue)
                news.append(("reconcile", i, replica.waiting, replica.held, unfinished, replica.newest))
        if now >= steps * WARM_SHARE:
            tokens = [replica.waiting + replica.held for replica in replicas]
            ratios.append(max(tokens) / max(1, statistics.fmean(tokens)))
    assert router.count == len(requests)
    waits_s.sort()
    return {
        "policy": policy,
        "decisions_per_s": round(router.count / router.wall_s),
        "decisions_per_cpu_s": round(router.count / router.cpu_s),
        "router_us": round((router.cpu_s + router.news_cpu_s) / router.count * 1e6, 1),
        "max_over_mean": round(statistics.fmean(ratios), 4),
        "worst": round(max(ratios), 4),
        "prefix_hit_share": round(hit / max(1, prompt), 4),
        "ttft_p50_s": round(waits_s[len(waits_s) // 2], 3),
        "ttft_p99_s": round(waits_s[int(len(waits_s) * 0.99)], 3),
    }


def possible_share(requests: list[Request]) -> float:
    """The share of the prompt tokens that belongs to system prompts."""
    shared = sum(min(prefix_length(request.prefix_id), request.prompt_tokens - 1) for request in requests)
    return shared / sum(request.prompt_tokens for request in requests)


def load_of(args: argparse.Namespace) -> list[Request]:
    """The requests that the command line asks for."""
    if args.generate:
        return router_load.generate(args.rate, args.seconds, args.seed)
    return router_load.replay(router_load.read(args.load), args.rate, args.seconds)


def main() -> None:
    """Print what each policy comes to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--replicas", type=int, default=64)
    parser.add_argument("--rate", type=float, default=10_000, help="requests offered per simulated second")
    parser.add_argument("--seconds", type=float, default=10, help="simulated seconds")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--policies", default=",".join(POLICIES))
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--load", type=Path, default=RECORDED, help="the recorded load to play; default: the one that is shipped")
    source.add_argument("--generate", action="store_true", help="make a load from --seed instead of playing a recorded one")
    source.add_argument("--record", type=Path, help="make a load from --seed, write it to this file, and simulate nothing")
    parser.add_argument("--json", action="store_true", help="one JSON line per policy")
    args = parser.parse_args()
    policies = args.policies.split(",")
    if unknown := set(policies) - set(POLICIES):
        parser.error(f"--policies {','.join(sorted(unknown))} does not exist. Choose among {','.join(POLICIES)}.")
    if min(args.replicas, args.rate, args.seconds, args.rate * args.seconds) <= 0 or args.rate * args.seconds < 1:
        parser.error(f"--replicas {args.replicas}, --rate {args.rate} and --seconds {args.seconds} must make at least one request.")
    if args.record:
        made = f"--rate {args.rate:g} --seconds {args.seconds:g} --seed {args.seed}"
        remark = f"made once by the generator: python benchmarks/router.py {made} --record {args.record.name}"
        router_load.write(router_load.generate(args.rate, args.seconds, args.seed), args.record, remark)
        return
    try:
        requests = load_of(args)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    gc.freeze()
    if not args.json:
        seconds, mean = requests[-1].arrival_s, statistics.fmean
        print(f"{len(requests)} requests in {seconds:.1f} s over {args.replicas} replicas, mean prompt "
              f"{mean(r.prompt_tokens for r in requests):.0f} tokens, output {mean(r.output_tokens for r in requests):.0f}; "
              f"prefix hits possible: {possible_share(requests):.4f}")  # fmt: skip
    for number, policy in enumerate(policies):
        line = simulate(policy, requests, args.replicas, args.seed)
        if args.json:
            print(
                json.dumps({**line, "replicas": args.replicas, "requests": len(requests), "possible": round(possible_share(requests), 4)})
            )
            continue
        if not number:
            print("  ".join(f"{name:>14}" for name in line))
        print("  ".join(f"{value:>14}" for value in line.values()), flush=True)


if __name__ == "__main__":
    main()
