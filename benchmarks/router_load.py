"""A load for the router's simulation: recorded, or made up, and skewed either way. One JSON line per request, by arrival:

    [0.0001, 512, 90, 3, "3-17"]      arrival_s, prompt_tokens, output_tokens, prefix_id, session; lines with # are remarks

A prompt begins with its system prompt, number `prefix_id`, whose length and tokens follow from the number alone.
"""

from __future__ import annotations

import functools
import json
import random
from array import array
from collections.abc import Iterator
from dataclasses import astuple, dataclass, replace
from pathlib import Path

import numpy as np

PREFIXES = 200
SESSIONS_PER_PREFIX = 100
PREFIX_EXPONENT = 1.0  # popularity of system prompt k is as 1 / (k + 1)
LENGTH_EXPONENT = 1.5  # a length x is as likely as x ** -1.5, between two ends
USER_TOKENS = (32, 2048)
OUTPUT_TOKENS = (8, 1024)
VOCABULARY = 50_000


@dataclass(slots=True)
class Request:
    """One request of the load."""

    arrival_s: float
    prompt_tokens: int
    output_tokens: int
    prefix_id: int
    session: str


@functools.cache
def prefix_length(prefix_id: int) -> int:
    """Tokens of a system prompt: 128 to 512, the same in every run."""
    return random.Random(prefix_id).randrange(128, 513)


def generate(rate: float, seconds: float, seed: int) -> list[Request]:
    """Poisson arrivals at `rate` per second; Zipf lengths and Zipf-popular system prompts; sessions keep their system prompt."""
    rng = np.random.default_rng(seed)
    count = int(rate * seconds)
    arrivals = np.cumsum(rng.exponential(1 / rate, count))
    prefixes = rng.choice(PREFIXES, count, p=_zipf(np.arange(1, PREFIXES + 1), PREFIX_EXPONENT))
    sessions = rng.integers(SESSIONS_PER_PREFIX, size=count)
    user, output = (
        rng.choice(np.arange(a, b + 1), count, p=_zipf(np.arange(a, b + 1), LENGTH_EXPONENT)) for a, b in (USER_TOKENS, OUTPUT_TOKENS)
    )
    shared = [prefix_length(i) for i in range(PREFIXES)]
    return [
        Request(round(float(at), 6), shared[p] + int(u), int(o), int(p), f"{p}-{s}")
        for at, p, s, u, o in zip(arrivals, prefixes, sessions, user, output, strict=True)
    ]


def _zipf(values: np.ndarray, exponent: float) -> np.ndarray:
    weights = values.astype(float) ** -exponent
    return weights / weights.sum()


def write(requests: list[Request], path: Path, remark: str) -> None:
    """One JSON line per request, after a remark on where they are from."""
    with path.open("w") as file:
        file.write(f"# {remark}\n")
        file.writelines(json.dumps(astuple(request), separators=(",", ":")) + "\n" for request in requests)


def read(path: Path) -> list[Request]:
    """The requests of a recorded file, by arrival. Raises ValueError naming the line that is not one."""
    requests = []
    for number, line in enumerate(path.read_text().splitlines(), 1):
        if line.startswith("#"):
            continue
        try:
            request = Request(*json.loads(line))
            fits = request.arrival_s >= 0 and request.prompt_tokens >= 1 and request.output_tokens >= 1 and request.prefix_id >= 0
        except (TypeError, ValueError):
            fits = False
        if not fits:
            raise ValueError(f"--load: line {number} is {line[:80]!r}, which is no request. Write lines as --record does.")
        requests.append(request)
    if not requests:
        raise ValueError("--load: the file holds no request. Write one with --record.")
    return sorted(requests, key=lambda request: request.arrival_s)


def replay(recorded: list[Request], rate: float, seconds: float) -> list[Request]:
    """A recording over and over, its pauses shortened or stretched so that `rate` requests arrive per second."""
    lap_s = len(recorded) / rate
    pace = lap_s / max(recorded[-1].arrival_s, 1e-9)
    count = int(rate * seconds)
    laps = (divmod(number, len(recorded)) for number in range(count))
    return [replace(recorded[at], arrival_s=lap * lap_s + recorded[at].arrival_s * pace) for lap, at in laps]


class Prompts:
    """The token ids of the requests: the same seed, the same ids."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)
        self._pool = array("i", (self._random.randrange(VOCABULARY) for _ in range(1 << 20))).tolist()
        self._prefixes: dict[int, list[int]] = {}

    def of(self, requests: list[Request]) -> Iterator[list[int]]:
        """For each request its system prompt, then tokens of its own."""
        for request in requests:
            shared = self._prefixes.get(request.prefix_id)
            if shared is None:
                own = random.Random(request.prefix_id)
                shared = [own.randrange(VOCABULARY) for _ in range(prefix_length(request.prefix_id))]
                self._prefixes[request.prefix_id] = shared
            at = self._random.randrange(len(self._pool) // 2)
            yield (shared + self._pool[at : at + max(0, request.prompt_tokens - len(shared))])[: request.prompt_tokens]
