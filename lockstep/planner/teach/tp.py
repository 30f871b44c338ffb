"""Tensor parallelism on matrices small enough to read: a column-parallel product, then a row-parallel one, then one all-reduce.

Z = relu(X A) B, the two products of an MLP (Shoeybi et al. 2019, section 3):

1. A is cut by columns. Rank r computes H_r = relu(X A_r): its columns of H. relu works on each element, so no rank needs the
   others' columns.
2. B is cut by rows, in the same places. Rank r computes Z_r = H_r B_r: as large as Z, but a part of every element's sum.
3. The all-reduce adds the Z_r up, message by message; every rank has Z.

Cut the other way round (A by rows), the sum is needed before relu: one more all-reduce, since relu(a + b) is not relu(a) + relu(b).
The numbers are small integers, so equal means equal. Attention is cut likewise: heads are columns of Q, K, V and rows of the
output matrix.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lockstep.config.errors import ConfigError
from lockstep.config.tree import opt
from lockstep.distributed.partition import Shard, head_shard, shard, shards
from lockstep.planner.teach import schedules
from lockstep.planner.teach.checks import whole, within
from lockstep.planner.teach.svg import COLOURS, Canvas
from lockstep.planner.teach.table import bytes_text, table

if TYPE_CHECKING:
    import numpy as np

    Matrix = np.ndarray[Any, np.dtype[np.int64]]
else:
    Matrix = Any

Rows = tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class Options:
    """The small matrices, and the layer whose weights are counted."""

    ranks: int = opt(2, "Ranks that share the product.", "-tp")
    tokens: int = opt(2, "Rows of X.")
    width: int = opt(4, "Columns of X, rows of A, columns of B.")
    inner: int = opt(6, "Columns of A and rows of B: what is cut.")
    seed: int = opt(0, "Of the random integers.")
    hidden: int = opt(8192, "Width of the layer whose weights are counted (default: Llama 70B).")
    intermediate: int = opt(28672, "Its MLP's inner width.")
    heads: int = opt(64, "Its query heads.")
    kv_heads: int = opt(8, "Its key and value heads.")
    head_dim: int = opt(128, "Elements of a head.")
    sizes: str = opt("1,2,4,8,16", "Numbers of ranks to count the layer's weights for.")

    def check(self) -> None:
        """Raises ConfigError for sizes that cannot be cut or shown."""
        for name, most in (("tokens", 8), ("width", 16), ("inner", 32), ("ranks", 32)):
            within(name, getattr(self, name), 1, most)
        for name in ("hidden", "intermediate", "heads", "kv_heads", "head_dim"):
            within(name, getattr(self, name), 1, 10**6)
        if self.heads % self.kv_heads:
            raise ConfigError(f"heads={self.heads} must be a multiple of kv_heads={self.kv_heads}: each KV head serves as many of them.")
        if self.ranks > self.inner:
            raise ConfigError(f"ranks={self.ranks} is more than inner={self.inner} columns to cut: raise inner, or take fewer ranks.")


@dataclass(frozen=True)
class Step:
    """One step of the computation: what happens, and the matrices it made, each with its name."""

    words: str
    matrices: tuple[tuple[str, Rows], ...]


@dataclass(frozen=True)
class LayerShare:
    """One layer's weights on the fullest rank, in 16 bits."""

    ranks: int
    attention_bytes: int
    mlp_bytes: int
    kv_heads: int  # of that rank
    ideal_bytes: float  # the whole layer over the ranks

    @property
    def total_bytes(self) -> int:
        return self.attention_bytes + self.mlp_bytes


@dataclass(frozen=True)
class Result:
    """Every step, and whether the ranks ended with the unsharded product."""

    options: Options
    cuts: tuple[Shard, ...]
    steps: tuple[Step, ...]
    rebuilt: bool
    wrong_way_differs: bool
    weight_elements: tuple[int, ...]  # of A and B, for each rank
    layer: tuple[LayerShare, ...]


def multiply(x: Matrix, a: Matrix, b: Matrix, cuts: Sequence[Shard]) -> tuple[list[Matrix], list[Matrix]]:
    """(H_r, Z_r) of every rank: x [tokens, width], a [width, inner], b [inner, width]; each rank uses its own run only."""
    import numpy as np

    hidden = [np.maximum(x @ a[:, cut.start : cut.stop], 0) for cut in cuts]
    return hidden, [h @ b[cut.start : cut.stop] for h, cut in zip(hidden, cuts, strict=True)]


def all_reduce(partials: Sequence[Matrix]) -> list[Matrix]:
    """The sum of all partial products, on every rank, by the ring's messages; each rank's matrix is cut into one run per rank."""
    import numpy as np

    n = len(partials)
    held = schedules.run(schedules.ring(n), [np.array_split(p.reshape(-1), n) for p in partials])
    return [np.concatenate(parts).reshape(partials[0].shape) for parts in held]


def layer_share(options: Options, ranks: int) -> LayerShare:
    """Attention (Q, K, V and output matrices) and MLP (gate, up, down) on the rank that has the most. Raises ConfigError."""
    o = options
    for name, most in (("heads", o.heads), ("intermediate", o.intermediate)):
        if ranks > most:
            raise ConfigError(f"sizes={o.sizes} counts the layer for {ranks} ranks, more than {name}={most}: take at most {most}.")

    def attention(rank: int) -> tuple[int, int]:
        own = head_shard(o.heads, o.kv_heads, ranks, rank)
        return 2 * o.hidden * o.head_dim * (2 * own.q.size + 2 * own.kv.size), own.kv.size

    most, kv = max(attention(rank) for rank in range(ranks))
    mlp = 2 * 3 * o.hidden * max(shard(o.intermediate, ranks, rank).size for rank in range(ranks))
    whole_layer = 2 * o.hidden * (o.head_dim * 2 * (o.heads + o.kv_heads) + 3 * o.intermediate)
    return LayerShare(ranks, most, mlp, kv, whole_layer / ranks)


def simulate(options: Options) -> Result:
    """Multiply whole and cut, and compare. Raises ConfigError for impossible settings."""
    import numpy as np

    options.check()
    draw = random.Random(options.seed)
    x, a, b = (
        np.array([[draw.randint(-3, 3) for _ in range(columns)] for _ in range(rows)], dtype=np.int64)
        for rows, columns in ((options.tokens, options.width), (options.width, options.inner), (options.inner, options.width))
    )
    cuts = shards(options.inner, options.ranks)
    wanted = np.maximum(x @ a, 0) @ b
    hidden, partials = multiply(x, a, b, cuts)
    sums = all_reduce(partials)
    by_rows = [x[:, cut.start : cut.stop] @ a[cut.start : cut.stop] for cut in shards(options.width, min(options.ranks, options.width))]
    early = sum(np.maximum(part, 0) for part in by_rows)
    ranks = range(options.ranks)
    a_parts = {f"A_{r}": a[:, cut.start : cut.stop] for r, cut in enumerate(cuts)}
    b_parts = {f"B_{r}": b[cut.start : cut.stop] for r, cut in enumerate(cuts)}
    steps = (
        Step("the unsharded product: Z = relu(X A) B", _shown(X=x, A=a, B=b, H=np.maximum(x @ a, 0), Z=wanted)),
        Step("A cut by columns, B by rows, in the same places", _shown(**a_parts, **b_parts)),
        Step("every rank: H_r = relu(X A_r), its own columns of H; nothing is sent", _shown(**{f"H_{r}": hidden[r] for r in ranks})),
        Step("every rank: Z_r = H_r B_r, a part of every sum", _shown(**{f"Z_{r}": partials[r] for r in ranks})),
        Step(f"all-reduce: Z on every rank after {2 * (options.ranks - 1)} ring steps", _shown(**{f"rank {r}": sums[r] for r in ranks})),
    )  # fmt: skip
    return Result(
        options=options,
        cuts=cuts,
        steps=steps,
        rebuilt=all(np.array_equal(one, wanted) for one in sums),
        wrong_way_differs=not np.array_equal(early, np.maximum(x @ a, 0)),
        weight_elements=tuple(2 * options.width * cut.size for cut in cuts),
        layer=tuple(layer_share(options, ranks) for ranks in whole("sizes", options.sizes)),
    )


def _shown(**matrices: Matrix) -> tuple[tuple[str, Rows], ...]:
    return tuple((name, tuple(tuple(int(v) for v in row) for row in matrix)) for name, matrix in matrices.items())


def report(result: Result) -> str:
    """Every step with its matrices, then the weights."""
    parts = []
    for number, step in enumerate(result.steps):
        parts += [f"{number}. {step.words}", "", side_by_side(step.matrices), ""]
    o = result.options
    parts.append(f"every rank has the unsharded Z, element for element: {'yes' if result.rebuilt else 'NO'}")
    if o.ranks > 1:
        found = "another result, so it would need one more all-reduce" if result.wrong_way_differs else "the same here, by chance"
        parts.append(f"A cut by rows, relu before the sum: {found}")
    held = ", ".join(map(str, result.weight_elements))
    parts += [f"weights of A and B by rank: {held} of {2 * o.width * o.inner} elements", "", layer_table(result)]
    return "\n".join(parts)


def layer_table(result: Result) -> str:
    """One layer's weights on the fullest rank."""
    rows = [
        (
            s.ranks,
            bytes_text(s.attention_bytes),
            s.kv_heads,
            bytes_text(s.mlp_bytes),
            bytes_text(s.total_bytes),
            f"{s.total_bytes / s.ideal_bytes:.3f}",
        )
        for s in result.layer
    ]
    head = ("TP", "attention", "KV heads", "MLP", "layer", "of an even share")
    return "one layer's weights on the fullest rank, 16 bits (from more ranks than KV heads on, those are held more than once)\n" + table(
        head, rows
    )


def side_by_side(matrices: Sequence[tuple[str, Rows]]) -> str:
    """Matrices next to each other, each under its name."""
    blocks = []
    for name, rows in matrices:
        wide = max((len(str(value)) for row in rows for value in row), default=1)
        lines = [f"{name} =", *("[" + " ".join(str(value).rjust(wide) for value in row) + "]" for row in rows)]
        blocks.append([line.ljust(max(map(len, lines))) for line in lines])
    tall = max(map(len, blocks))
    padded = [block + [" " * len(block[0])] * (tall - len(block)) for block in blocks]
    return "\n".join("   " + "   ".join(row).rstrip() for row in zip(*padded, strict=True))


def picture(result: Result) -> str:
    """Who holds what: A's columns and B's rows in the colour of their rank, and the sum at the end."""
    o, cell = result.options, 22.0
    a_wide, b_wide = o.inner * cell, o.width * cell
    left = 40 + o.width * cell + 50
    canvas = Canvas(
        left + a_wide + 60 + b_wide + 60 + b_wide + 40, max(o.inner, o.width, o.tokens) * cell + 140, f"relu(X A) B over {o.ranks} ranks"
    )
    matrices = dict(result.steps[0].matrices)

    def draw(name: str, x: float, rows: Rows, colour_of: Any) -> None:
        canvas.text(x, 66, name, kind="b")
        for i, row in enumerate(rows):
            for j, value in enumerate(row):
                canvas.rect(x + j * cell, 76 + i * cell, cell - 1, cell - 1, colour_of(i, j))
                canvas.text(x + (j + 0.5) * cell - 0.5, 76 + (i + 0.7) * cell, value, anchor="middle", kind="w")

    def owner(index: int) -> str:
        return COLOURS[next(r for r, cut in enumerate(result.cuts) if cut.start <= index < cut.stop) % len(COLOURS)]

    grey = "#8b8f98"
    draw("X, on every rank", 40, matrices["X"], lambda i, j: grey)
    draw("A, cut by columns", left, matrices["A"], lambda i, j: owner(j))
    draw("B, cut by rows", left + a_wide + 60, matrices["B"], lambda i, j: owner(i))
    draw("Z, the sum of all", left + a_wide + b_wide + 120, matrices["Z"], lambda i, j: grey)
    bottom = canvas.height - 22
    for rank in range(o.ranks):
        canvas.rect(40 + 90 * rank, bottom - 10, 12, 12, COLOURS[rank % len(COLOURS)])
        canvas.text(58 + 90 * rank, bottom, f"rank {rank}")
    return canvas.svg()
