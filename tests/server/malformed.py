"""Requests that no server should take, made from a seed: what they are, and how they are sent."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from typing import Any

GOOD = {"model": "lockstep-demo", "prompt": "def f(", "max_tokens": 4, "temperature": 0}
PATHS = (
    *("/v1/completions", "/v1/completions", "/v1/chat/completions", "/v1/responses", "/v1/embeddings", "/tokenize", "/detokenize"),
    *("/v1/models/x", "/nowhere", "/v1/completions/"),
)
FIELDS = (
    *(
        "model",
        "prompt",
        "messages",
        "max_tokens",
        "n",
        "best_of",
        "temperature",
        "top_p",
        "top_k",
        "min_p",
        "seed",
        "stop",
        "stream",
        "echo",
    ),
    *(
        "logprobs",
        "top_logprobs",
        "logit_bias",
        "presence_penalty",
        "frequency_penalty",
        "repetition_penalty",
        "min_tokens",
        "suffix",
        "user",
    ),
    *("stream_options", "response_format", "tools", "tool_choice", "structured_outputs", "priority", "timeout", "stop_token_ids"),
    *("allowed_token_ids", "bad_words", "prompt_logprobs", "cache_salt", "truncate_prompt_tokens", "input", "tokens", "ignore_eos"),
)
WRONG: tuple[Any, ...] = (
    *(None, True, -1, 0, 1.5, 10**9, 2**63, 2**64, -(2**63), 1e308, 1e-300, "", "x", "\x00", "\ufffe", "-1", "nan"),
    *([], [[]], [None], ["x", 1], [-1], [2**40], [[1, -5]], {}, {"": None}, {"a": {"b": [1, {"c": "x"}]}}, {"1": "x"}, {"-7": 100}, [{}]),
    *(
        [{"role": "user"}],
        [{"role": 1, "content": 2}],
        [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "file:///etc/passwd"}}]}],
    ),
    *(
        {"type": "json_schema"},
        {"type": "json_schema", "json_schema": {"name": "x", "schema": {"$ref": "#"}}},
        {"regex": "(a+)+$" * 50},
        {"json": "{"},
    ),
    *({"type": "regex", "pattern": "("}, [{"type": "function"}], {"include_usage": "x"}, "a" * 5000, list(range(3000)), ["a"] * 3000),
)


def fuzzed(rng: random.Random) -> dict[str, Any]:
    """A request with fields of wrong types and values."""
    body = dict(GOOD) if rng.random() < 0.8 else {}
    body |= {rng.choice(FIELDS): rng.choice(WRONG) for _ in range(rng.randint(1, 4))}
    for name in ("max_tokens", "min_tokens"):  # what is right after all should not take long
        if isinstance(body.get(name), int) and 4 < body[name] < 1 << 31:
            body[name] = 4
    return body


def bytes_of(rng: random.Random) -> bytes:
    """A body: JSON of wrong requests, JSON that is cut or changed, or none at all."""
    text = json.dumps(fuzzed(rng)).encode()
    kind = rng.randrange(9)
    if kind < 4:
        return text
    if kind == 4:
        return text[: rng.randrange(len(text))]
    if kind == 5:
        at = rng.randrange(len(text))
        return text[:at] + rng.choice((b"\xff", b"\xc0\x80", b"\xed\xa0\x80", b"\x00", b"\\ud800", b"NaN", b"{", b'"')) + text[at + 1 :]
    if kind == 6:
        depth = rng.choice((10, 100, 10_000, 200_000))
        return b'{"prompt":' + rng.choice((b"[", b'{"a":')) * depth
    if kind == 7:
        return b'{"prompt": "x", "n": %d, "max_tokens": %s}' % (
            rng.choice((17, 10**6, 10**30)),
            rng.choice((b"1e999", b"9" * 5000, b"-0", b"1.0")),
        )
    return rng.randbytes(rng.choice((1, 100, 10_000)))


def huge(rng: random.Random) -> bytes:
    """About 10 MB."""
    count = 10_000_000
    return rng.choice(
        (
            lambda: b'{"prompt": "' + b"a" * count + b'", "max_tokens": 1}',
            lambda: b'{"prompt": [' + b"1," * (count // 2) + b"1]}",
            lambda: b'{"prompt": [' + b'"",' * (count // 3) + b'""]}',
            lambda: b'{"messages": [{"role": "user", "content": "' + b" " * count + b'"}]}',
            lambda: b"[" + b"[]," * (count // 3) + b"[]]",
            lambda: b" " * (20 << 20),
        )
    )()


def raw(rng: random.Random) -> bytes:
    """What is hardly HTTP, or stops in the middle."""
    makers: tuple[Callable[[], bytes], ...] = (
        lambda: rng.randbytes(rng.randint(1, 300)),
        lambda: b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{",  # never goes on
        lambda: b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n{}" % rng.choice((-1, 10**20)),
        lambda: b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nffffffffffffffff\r\n",
        lambda: b"GET / HTTP/1.1\r\n" + b"X: y\r\n" * rng.randint(1, 8000),
        lambda: b"GET /" + b"a" * rng.choice((10, 20_000)),
        lambda: b"GET /%ff%00%2e%2e/v1/models HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n",
        lambda: b"GET /v1/models HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\nConnection: upgrade, close\r\n\r\n",
        lambda: b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + rng.randbytes(64),
    )
    return rng.choice(makers)()
