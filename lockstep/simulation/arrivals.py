"""Requests over time: what the simulated clients ask for, and when. Seeded, so that a run can be repeated."""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from pathlib import Path

from lockstep.config.errors import ConfigError
from lockstep.protocol import EngineRequest, SamplingParams


@dataclass(frozen=True)
class Arrival:
    """One request: when it comes, the tokens of its prompt, and how many it generates."""

    at_s: float
    input_tokens: int
    output_tokens: int


def at_once(count: int, input_tokens: int, output_tokens: int) -> list[Arrival]:
    """`count` equal requests at time 0."""
    return [Arrival(0.0, input_tokens, output_tokens)] * count


def poisson(rate: float, count: int, input_tokens: int, output_tokens: int, *, spread: float = 0.0, seed: int = 0) -> list[Arrival]:
    """`count` requests, `rate` of them a second on average, the pauses between them exponential.

    spread: lengths are uniform within this share of the given ones, both ways. Raises ConfigError for an impossible number.
    """
    if not rate > 0:
        raise ConfigError(f"rate={rate} is impossible: it must be greater than 0 requests a second.")
    if not 0 <= spread < 1:
        raise ConfigError(f"spread={spread} is impossible: it must be from 0 to less than 1.")
    rng, now, found = random.Random(seed), 0.0, []
    for _ in range(count):
        now += rng.expovariate(rate)
        found.append(Arrival(now, _length(rng, input_tokens, spread), _length(rng, output_tokens, spread)))
    return found


def _length(rng: random.Random, tokens: int, spread: float) -> int:
    return max(1, round(tokens * (1 + spread * (2 * rng.random() - 1))))


def trace(path: str | Path) -> list[Arrival]:
    """The requests of a file: JSON lines with `timestamp` (seconds), `input_length` and `output_length`, the first at time 0.

    Raises ConfigError for a file that is not there or has another form.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError) as e:
        raise ConfigError(f"trace={str(path)!r} cannot be read ({e}): name a file with one JSON object a line.") from None
    found = [_of_line(line, f"line {number} of trace={str(path)!r}") for number, line in enumerate(lines, 1) if line.strip()]
    found.sort(key=lambda arrival: arrival.at_s)
    first = found[0].at_s if found else 0.0
    return [Arrival(a.at_s - first, a.input_tokens, a.output_tokens) for a in found]


def _of_line(line: str, where: str) -> Arrival:
    try:
        entry = json.loads(line)
        found = Arrival(float(entry["timestamp"]), int(entry["input_length"]), int(entry["output_length"]))
    except (ValueError, KeyError, TypeError) as e:
        what = f"has no {e}" if isinstance(e, KeyError) else f"does not fit ({e})"
        raise ConfigError(f"{where} {what}: write timestamp, input_length and output_length.") from None
    if found.input_tokens < 1 or found.output_tokens < 1:
        raise ConfigError(f"{where} has lengths {found.input_tokens} and {found.output_tokens}: both must be at least 1.")
    return found


def as_request(number: int, arrival: Arrival, vocab_size: int) -> EngineRequest:
    """The engine's request for an arrival. Prompts of different numbers share no prefix."""
    return EngineRequest(
        request_id=f"{number}",
        prompt_token_ids=_prompt(number, arrival.input_tokens, vocab_size),
        sampling=SamplingParams(max_tokens=arrival.output_tokens, ignore_eos=True, temperature=0.0),
        seed=number,
        arrival_s=arrival.at_s,
    )


def _prompt(number: int, tokens: int, vocab_size: int) -> list[int]:
    """`number` in digits of the vocabulary, and zeros."""
    digits: list[int] = []
    while number:
        number, digit = divmod(number, vocab_size)
        digits.append(digit)
    return (digits + [0] * tokens)[:tokens]
