"""Context parallelism: one sequence's keys and values shared out over ranks, and the merge that makes attention whole again.

Each rank attends to its own tokens and hands on two things for a query head: its output o_i, normalised over its own tokens, and
the logarithm of the sum of its exponentials, lse_i. With s_j the scores and v_j the values,

    lse = log sum_i exp(lse_i)        o = sum_i exp(lse_i - lse) o_i        (Milakov and Gimelshein 2018; FlashAttention)

is the attention over all tokens: exp(lse_i) is the weight that rank i's tokens have together. It is an identity, not an
approximation. It is shown twice: with scores k log 2, whose exponentials 2^k are whole numbers, in exact fractions; and in floats.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise

from lockstep.config.errors import ConfigError
from lockstep.config.tree import opt
from lockstep.distributed.partition import head_shard
from lockstep.planner.teach.checks import whole, within
from lockstep.planner.teach.svg import Axis, Canvas, Series, chart
from lockstep.planner.teach.table import bytes_text, table


@dataclass(frozen=True)
class Options:
    """The small attention that is merged, and the model whose memory and traffic are counted (default: Llama 70B)."""

    ranks: int = opt(4, "Ranks that share the small sequence.", "-cp")
    tokens: int = opt(12, "Its tokens.")
    head_dim: int = opt(3, "Elements of its one head.")
    seed: int = opt(0, "Of its random numbers.")
    sizes: str = opt("1,2,4,8,16", "Context-parallel sizes to count for.")
    tensor: int = opt(8, "Tensor-parallel ranks beside.", "-tp")
    context: int = opt(131072, "Tokens of the long sequence.")
    layers: int = opt(80, "Layers of the model.")
    heads: int = opt(64, "Its query heads.")
    kv_heads: int = opt(8, "Its key and value heads.")
    model_head_dim: int = opt(128, "Elements of its heads.")
    chunk: int = opt(2048, "Tokens of a prefill step.")

    def check(self) -> None:
        """Raises ConfigError for what cannot be."""
        within("ranks", self.ranks, 1, 64)
        within("tokens", self.tokens, 1, 4096)
        if self.ranks > self.tokens:
            raise ConfigError(f"ranks={self.ranks} is more than tokens={self.tokens}: use fewer ranks, or more tokens.")
        within("head_dim", self.head_dim, 1, 64)
        for name in ("tensor", "context", "layers", "heads", "kv_heads", "model_head_dim", "chunk"):
            within(name, getattr(self, name), 1, 10**8)


@dataclass(frozen=True)
class Part:
    """One rank's answer in exact numbers: its tokens, the sum of their weights (exp of its lse), its own output."""

    tokens: tuple[int, int]
    weight: Fraction
    output: tuple[Fraction, ...]


@dataclass(frozen=True)
class Share:
    """What one context-parallel size means for the model's long sequence, in 16 bits (lse in 32)."""

    ranks: int
    kv_bytes: int  # of a rank, for the whole sequence
    decode_bytes: int  # that a rank sends for one token, all layers: outputs and lse of the heads that other ranks merge
    prefill_merge_bytes: int  # the same for a chunk
    prefill_kv_bytes: int  # the alternative for a chunk: every rank's keys and values pass by the queries


@dataclass(frozen=True)
class Result:
    """The small merge, exactly and in floats, and the table of sizes."""

    options: Options
    parts: tuple[Part, ...]
    whole: tuple[Fraction, ...]
    merged: tuple[Fraction, ...]
    float_error: float  # largest difference of an element, merged against whole, in floats
    order_error: float  # the same between merging from the left and as a tree
    shares: tuple[Share, ...]


def split(tokens: int, ranks: int) -> list[tuple[int, int]]:
    """Even runs of tokens, the first ones one longer."""
    bounds = [r * (tokens // ranks) + min(r, tokens % ranks) for r in range(ranks + 1)]
    return list(pairwise(bounds))


def exact_part(weights: Sequence[int], values: Sequence[Sequence[int]], tokens: tuple[int, int]) -> Part:
    """Attention over a run of tokens: sum of weight x value over the sum of the weights."""
    run = range(*tokens)
    total = Fraction(sum(weights[j] for j in run))
    return Part(
        tokens, total, tuple(sum((weights[j] * Fraction(values[j][d]) for j in run), Fraction(0)) / total for d in range(len(values[0])))
    )


def exact_merge(parts: Sequence[Part]) -> tuple[Fraction, ...]:
    """The merge with exp(lse_i) as it is: exact."""
    total = sum((part.weight for part in parts), Fraction(0))
    return tuple(sum((part.weight / total * part.output[d] for part in parts), Fraction(0)) for d in range(len(parts[0].output)))


def attend(scores: Sequence[float], values: Sequence[Sequence[float]]) -> tuple[list[float], float]:
    """(output, lse) in floats, the largest score taken out first."""
    top = max(scores)
    weights = [math.exp(s - top) for s in scores]
    total = sum(weights)
    out = [sum(w * v[d] for w, v in zip(weights, values, strict=True)) / total for d in range(len(values[0]))]
    return out, top + math.log(total)


def merge(a: tuple[list[float], float], b: tuple[list[float], float]) -> tuple[list[float], float]:
    """Two (output, lse) as one, in floats."""
    top = max(a[1], b[1])
    wa, wb = math.exp(a[1] - top), math.exp(b[1] - top)
    return [(wa * x + wb * y) / (wa + wb) for x, y in zip(a[0], b[0], strict=True)], top + math.log(wa + wb)


def merge_tree(parts: Sequence[tuple[list[float], float]]) -> tuple[list[float], float]:
    """All of them, neighbours first."""
    found = list(parts)
    while len(found) > 1:
        found = [merge(*found[i : i + 2]) if i + 1 < len(found) else found[i] for i in range(0, len(found), 2)]
    return found[0]


def merge_left(parts: Sequence[tuple[list[float], float]]) -> tuple[list[float], float]:
    """All of them, one after the other."""
    found = parts[0]
    for part in parts[1:]:
        found = merge(found, part)
    return found


def share(options: Options, ranks: int) -> Share:
    """Memory and traffic of a rank. Raises ConfigError when TP does not fit the heads."""
    o = options
    own = head_shard(o.heads, o.kv_heads, o.tensor, 0)
    per_token = 2 * 2 * own.kv.size * o.model_head_dim * o.layers
    most = -(-o.context // ranks)
    answer = own.q.size * (2 * o.model_head_dim + 4) * o.layers * (ranks - 1) // ranks
    return Share(ranks, most * per_token, answer, answer * o.chunk, per_token * most * (ranks - 1))


def simulate(options: Options) -> Result:
    """Cut the small attention and merge it; count for the model. Raises ConfigError for impossible settings."""
    options.check()
    o, draw = options, random.Random(options.seed)
    powers = [draw.randint(0, 12) for _ in range(o.tokens)]
    values = [[draw.randint(-9, 9) for _ in range(o.head_dim)] for _ in range(o.tokens)]
    runs = split(o.tokens, o.ranks)
    weights = [1 << power for power in powers]
    parts = tuple(exact_part(weights, values, run) for run in runs)
    scores = [draw.gauss(0.0, 4.0) for _ in range(o.tokens)]
    floats = [[draw.gauss(0.0, 1.0) for _ in range(o.head_dim)] for _ in range(o.tokens)]
    answers = [attend(scores[a:b], floats[a:b]) for a, b in runs]
    left, tree = merge_left(answers)[0], merge_tree(answers)[0]
    return Result(
        options=o,
        parts=parts,
        whole=exact_part(weights, values, (0, o.tokens)).output,
        merged=exact_merge(parts),
        float_error=_apart(tree, attend(scores, floats)[0]),
        order_error=_apart(left, tree),
        shares=tuple(share(o, ranks) for ranks in whole("sizes", o.sizes)),
    )


def _apart(a: Sequence[float], b: Sequence[float]) -> float:
    return max(abs(x - y) for x, y in zip(a, b, strict=True))


def report(result: Result) -> str:
    """The parts and their merge, then memory and traffic."""
    o = result.options
    rows = [
        (f"rank {i}", f"{p.tokens[0]} to {p.tokens[1] - 1}", p.weight, "  ".join(f"{float(v):+.4f}" for v in p.output))
        for i, p in enumerate(result.parts)
    ]
    both = [("merged", "all", sum((p.weight for p in result.parts), Fraction(0)), "  ".join(f"{float(v):+.4f}" for v in result.merged))]
    sizes = [
        (s.ranks, bytes_text(s.kv_bytes), bytes_text(s.decode_bytes), bytes_text(s.prefill_merge_bytes), bytes_text(s.prefill_kv_bytes))
        for s in result.shares
    ]
    return "\n".join(
        [
            f"attention of one query over {o.tokens} tokens on {o.ranks} ranks; every score is k log 2",
            "",
            table(("", "tokens", "exp(lse)", "output"), rows + both),
            "",
            f"merged = whole, as fractions: {'yes' if result.merged == result.whole else 'NO'} (first element {result.merged[0]})",
            f"in floats, with random scores: {'within' if result.float_error < 1e-14 else 'NOT within'} 1e-14 of the whole; "
            f"{'within' if result.order_error < 1e-14 else 'NOT within'} 1e-14 whichever order is merged in",
            "",
            f"{o.context} tokens of the model, with TP={o.tensor}: KV of a rank, and what a rank sends",
            table(("CP", "KV of a rank", "decode: merge", f"prefill of {o.chunk}: merge", "or pass all KV round"), sizes),
        ]
    )


def picture(result: Result) -> str:
    """KV of a rank, and both ways of a prefill, by context-parallel size."""
    canvas = Canvas(820, 400, f"{result.options.context:,} tokens over context-parallel ranks")
    several = [s for s in result.shares if s.ranks > 1]
    series = [
        Series("KV of a rank", [(s.ranks, s.kv_bytes) for s in result.shares]),
        Series("sent to merge, 1 token", [(s.ranks, s.decode_bytes) for s in several]),
        Series(f"sent to merge, {result.options.chunk} tokens", [(s.ranks, s.prefill_merge_bytes) for s in several]),
        Series("sent to pass KV round", [(s.ranks, s.prefill_kv_bytes) for s in several]),
    ]
    most = max(2, *(s.ranks for s in result.shares))
    across = Axis("context-parallel ranks", 1, most, [(s.ranks, str(s.ranks)) for s in result.shares], log=True)
    up = Axis("bytes", 1 << 15, 1 << 40, [(1 << e, bytes_text(1 << e)) for e in range(15, 41, 5)], log=True)
    chart(canvas, 90, 70, 500, 260, "Bytes of a rank", across, up, series)
    return canvas.svg()
