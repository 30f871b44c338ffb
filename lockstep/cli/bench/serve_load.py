"""The requests of `lockstep bench serve`: what they ask, and when. The same seed, the same load."""

from __future__ import annotations

import json
import math
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lockstep.cli.bench.workload import random_prompts
from lockstep.cli.errors import UsageError

WORDS = "the of and to in is for that with as on by this are be from or an not it at was all one new more"  # a token each, mostly


@dataclass(frozen=True)
class Ask:
    """One request: its prompt, as token ids, text or a chat's messages, and the tokens that it may generate."""

    prompt: list[int] | str | list[dict[str, Any]]
    output_tokens: int

    def body(self, chat: bool) -> dict[str, Any]:
        """The fields of a request that say what is asked."""
        if not chat:
            return {"prompt": self.prompt, "max_tokens": self.output_tokens}
        messages = self.prompt if isinstance(self.prompt, list) else [{"role": "user", "content": self.prompt}]
        return {"messages": messages, "max_tokens": self.output_tokens}


def lengths(mean: int, ratio: float, count: int, rng: random.Random) -> list[int]:
    """Uniform between mean * (1 - ratio) and mean * (1 + ratio), at least 1."""
    low, high = math.floor(mean * (1 - ratio)), math.ceil(mean * (1 + ratio))
    return [max(1, rng.randint(low, high)) for _ in range(count)]


def random_load(
    count: int, input_len: int, output_len: int, ratio: float, prefixes: int, prefix_len: int, vocab_size: int, chat: bool, seed: int
) -> list[Ask]:
    """Random prompts; with `prefixes`, each begins with one of so many shared texts of `prefix_len` tokens."""
    rng = random.Random(seed)
    inputs, outputs = lengths(input_len, ratio, count, rng), lengths(output_len, ratio, count, rng)
    shared = random_prompts(vocab_size, [prefix_len] * prefixes, seed + 1) if prefixes else [[]]
    own = random_prompts(vocab_size, inputs, seed + 2)
    prompts = [shared[rng.randrange(len(shared))] + tokens for tokens in own]
    return [Ask(as_text(p) if chat else p, n) for p, n in zip(prompts, outputs, strict=True)]


def as_text(tokens: list[int]) -> str:
    """Words in place of token ids, for servers that take text only: about as many tokens, the same for the same ids."""
    words = WORDS.split()
    return " ".join(words[token % len(words)] for token in tokens)


def read_load(path: Path, count: int, output_len: int, chat: bool) -> list[Ask]:
    """The first `count` requests of a file of JSON lines, from its start again where there are fewer.

    A line has `prompt` (text or token ids) or `messages`, and may have `output_tokens`. Raises UsageError naming the line.
    """
    try:
        lines = [line for line in path.read_text().splitlines() if line.strip()]
    except OSError as e:
        raise UsageError(f"--dataset-path={path} cannot be read: {e.strerror}.") from None
    asks = [_ask(path, number, line, output_len, chat) for number, line in enumerate(lines[:count], 1)]
    if not asks:
        raise UsageError(f"--dataset-path={path} is empty: it needs lines of JSON with a prompt.")
    return [asks[i % len(asks)] for i in range(count)]


def _ask(path: Path, number: int, line: str, output_len: int, chat: bool) -> Ask:
    try:
        found = json.loads(line)
        prompt = found["messages"] if chat and "messages" in found else found["prompt"]
        tokens = int(found.get("output_tokens", found.get("max_tokens", output_len)))
    except (ValueError, KeyError, TypeError, AttributeError):
        need = "`messages` or `prompt`" if chat else "`prompt`"
        raise UsageError(f"--dataset-path={path}: line {number} is no JSON object with {need}: {line[:80]}") from None
    ids = isinstance(prompt, list) and all(isinstance(token, int) for token in prompt)
    talk = isinstance(prompt, list) and all(isinstance(message, dict) for message in prompt)
    if not (isinstance(prompt, str) or (talk and chat) or (ids and not chat)):
        raise UsageError(f"--dataset-path={path}: line {number} has a prompt that this endpoint does not take: {line[:80]}")
    return Ask(prompt, tokens)


def arrivals(count: int, rate: float, burstiness: float, seed: int) -> list[float]:
    """Seconds after the start at which each request is due: gamma-distributed gaps of mean 1 / rate.

    burstiness: the gamma's shape. 1 is Poisson, below 1 comes in bursts, above 1 is more even. An infinite rate: all at once.
    """
    if math.isinf(rate):
        return [0.0] * count
    rng = random.Random(seed)
    gaps = [rng.gammavariate(burstiness, 1 / (rate * burstiness)) for _ in range(count)]
    total, due = 0.0, []
    for gap in gaps:
        due.append(total)
        total += gap
    return due
