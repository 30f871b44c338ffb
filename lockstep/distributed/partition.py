"""The shard map: which part of the model each rank holds. Pure arithmetic, no torch.

One map serves the loader, the layers, the KV manager and the planner. A dimension of `units` indivisible units (heads,
MLP columns) is cut into *atoms*, at most 8 of them for TP <= 8, on boundaries that depend on the model alone. A rank
owns a run of whole atoms, so TP 2, 4 and 8 cut at the same points and any size in between works too (3, 5, 6, 7). The
price of fixed atoms: a size that is no power of two is balanced to one atom, not to one unit.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import TYPE_CHECKING

from lockstep.config.errors import ConfigError
from lockstep.config.stages import check_stages, explicit_counts

if TYPE_CHECKING:
    from lockstep.config.model_spec import ModelSpec

ATOMS = 8
VOCAB_PADDING = 64


@dataclass(frozen=True)
class Shard:
    """The half-open run [start, stop) of a dimension that one rank owns."""

    start: int
    stop: int

    @property
    def size(self) -> int:
        return self.stop - self.start

    def scaled(self, unit: int) -> Shard:
        """The same run where each unit is `unit` elements wide (heads -> columns)."""
        return Shard(self.start * unit, self.stop * unit)


@dataclass(frozen=True)
class HeadShard:
    """Attention heads of one rank. `kv_of_q[i]` is the local KV head that local query head i reads."""

    q: Shard
    kv: Shard
    kv_of_q: tuple[int, ...]


@dataclass(frozen=True)
class VocabShard:
    """Rows [start, stop) of the padded vocabulary. Rows at or past `vocab_size` are padding, zero on every rank."""

    start: int
    stop: int
    vocab_size: int
    padded_size: int

    @property
    def size(self) -> int:
        """Rows of this rank, padding included."""
        return self.stop - self.start

    @property
    def filled(self) -> Shard:
        """The rows that exist in the checkpoint; empty when this rank holds padding only."""
        return Shard(min(self.start, self.vocab_size), min(self.stop, self.vocab_size))


def _check_rank(tp: int, rank: int) -> None:
    if tp < 1:
        raise ConfigError(f"tensor_parallel_size={tp} must be at least 1.")
    assert 0 <= rank < tp, f"rank {rank} is not in a group of {tp}"


@lru_cache(maxsize=1024)
def atom_bounds(units: int, tp: int) -> tuple[int, ...]:
    """The atoms' boundaries over `units`: atom i is [bounds[i], bounds[i + 1]).

    The number of atoms is min(units, 8), or min(units, tp) when TP exceeds 8. Boundary i is i * units / atoms rounded to
    nearest, so that every boundary of 4 atoms is one of 8 atoms, and so on.
    """
    count = min(units, ATOMS if tp <= ATOMS else tp)
    return tuple((2 * i * units + count) // (2 * count) for i in range(count + 1))


def _run(count: int, parts: int, index: int) -> Shard:
    """Part `index` of `count` items cut evenly, where the first `count % parts` parts get one more."""
    base, extra = divmod(count, parts)
    start = index * base + min(index, extra)
    return Shard(start, start + base + (index < extra))


def shard(units: int, tp: int, rank: int) -> Shard:
    """The units that `rank` of `tp` owns: a run of whole atoms, first ranks one atom more where they do not divide.

    Raises ConfigError when there are fewer units than ranks.
    """
    _check_rank(tp, rank)
    if units < tp:
        raise ConfigError(f"tensor_parallel_size={tp} is larger than the {units} units to cut: use at most {units}.")
    bounds = atom_bounds(units, tp)
    atoms = _run(len(bounds) - 1, tp, rank)
    return Shard(bounds[atoms.start], bounds[atoms.stop])


def shards(units: int, tp: int) -> tuple[Shard, ...]:
    """`shard` of every rank, in rank order."""
    return tuple(shard(units, tp, rank) for rank in range(tp))


def head_shard(num_heads: int, num_kv_heads: int, tp: int, rank: int) -> HeadShard:
    """Query heads of `rank`, and every KV head they read (held by several ranks where the cut falls inside its group).

    Raises ConfigError when TP exceeds the query heads, or when KV heads do not divide them.
    """
    _check_rank(tp, rank)
    if num_kv_heads < 1 or num_heads % num_kv_heads:
        raise ConfigError(f"num_attention_heads={num_heads} must be a multiple of num_key_value_heads={num_kv_heads}.")
    if tp > num_heads:
        raise ConfigError(
            f"tensor_parallel_size={tp} is larger than num_attention_heads={num_heads}: use at most {num_heads},"
            " and pipeline or data parallelism for the other devices."
        )
    group = num_heads // num_kv_heads
    q = shard(num_heads, tp, rank)
    kv = Shard(q.start // group, (q.stop - 1) // group + 1)
    return HeadShard(q, kv, tuple(head // group - kv.start for head in range(q.start, q.stop)))


def padded_vocab(vocab: int, pad: int = VOCAB_PADDING) -> int:
    """`vocab` rounded up to a multiple of `pad`."""
    return -(-vocab // pad) * pad


def vocab_shard(vocab: int, tp: int, rank: int, pad: int = VOCAB_PADDING) -> VocabShard:
    """The rows of the padded vocabulary that `rank` owns: an even cut, first ranks one row more."""
    _check_rank(tp, rank)
    total = padded_vocab(vocab, pad)
    if total < tp:
        raise ConfigError(f"tensor_parallel_size={tp} is larger than the padded vocabulary of {total} rows: use at most {total}.")
    rows = _run(total, tp, rank)
    return VocabShard(rows.start, rows.stop, vocab, total)


@dataclass(frozen=True)
class ShardMap:
    """Everything tensor parallelism cuts, for one rank."""

    heads: HeadShard
    mlp: Shard
    vocab: VocabShard

    @classmethod
    def of(cls, spec: ModelSpec, tp: int, rank: int) -> ShardMap:
        """The map of `rank` of `tp` for this model. Raises ConfigError when the model cannot be cut so finely."""
        heads = head_shard(spec.num_heads, spec.num_kv_heads, tp, rank)
        most = spec.intermediate_size
        if tp > most:
            raise ConfigError(f"tensor_parallel_size={tp} is larger than intermediate_size={most}: use at most {most}.")
        return cls(heads, shard(spec.intermediate_size, tp, rank), vocab_shard(spec.vocab_size, tp, rank))


def layer_partition(num_layers: int, pp: int, how: str | Sequence[int] = "even") -> tuple[Shard, ...]:
    """The layers of each pipeline stage: contiguous runs, in stage order, at least one layer each.

    `how` is "even" (first stages one more), "reference" (the ecosystem's rule: the remainder goes to the second last
    stage and backwards from there, as the last stage also has the head), or the counts themselves ("5,6,6,5" or a list).
    "balanced" needs to know the model: see `stage_layers`. Raises ConfigError when the counts do not fit.
    """
    check_stages(num_layers, pp, how)
    if how == "even":
        return tuple(_run(num_layers, pp, stage) for stage in range(pp))
    counts = _reference_counts(num_layers, pp) if how == "reference" else explicit_counts(how, num_layers, pp)
    bounds = [0]
    for count in counts:
        bounds.append(bounds[-1] + count)
    return tuple(Shard(start, stop) for start, stop in pairwise(bounds))


def stage_layers(spec: ModelSpec, pp: int, how: str | None = None) -> tuple[Shard, ...]:
    """The layers of each pipeline stage of this model. `how` as in `layer_partition`; None is "balanced".

    Balanced: each layer costs its share of the model's weight bytes plus its share of the multiplications of a token;
    the first stage also has the embedding's bytes, the last one the head's bytes and multiplications. Of all contiguous
    partitions, one whose dearest stage is the cheapest, and among these the one that is most even.
    """
    if how not in (None, "balanced"):
        return layer_partition(spec.num_layers, pp, how)
    check_stages(spec.num_layers, pp)
    costs = StageCosts.of(spec)
    # (stages, layers) placed -> (dearest stage, sum of squares, boundaries)
    best: dict[tuple[int, int], tuple[float, float, tuple[int, ...]]] = {(0, 0): (0.0, 0.0, ())}
    layers = spec.num_layers
    for stage in range(pp):
        for end in range(stage + 1, layers - (pp - stage - 1) + 1):
            for start in range(stage, end):
                before = best.get((stage, start))
                if before is not None and (stage > 0) == (start > 0):
                    cost = costs.stage(end - start, first=stage == 0, last=stage == pp - 1)
                    found = (round(max(before[0], cost), 12), before[1] + cost * cost, (*before[2], end))
                    best[stage + 1, end] = min(best.get((stage + 1, end), found), found)
    bounds = (0, *best[pp, layers][2])
    return tuple(Shard(start, stop) for start, stop in pairwise(bounds))


@dataclass(frozen=True)
class StageCosts:
    """What parts of a model cost a pipeline stage: shares of all weight bytes plus shares of all multiplications, of 2 in all."""

    layer: float
    embedding: float  # on the first stage: memory only, its rows are looked up
    head: float  # on the last stage: memory and multiplications

    @classmethod
    def of(cls, spec: ModelSpec) -> StageCosts:
        heads = spec.num_heads + 2 * spec.num_kv_heads
        layer = spec.hidden_size * spec.head_dim * (heads + spec.num_heads) + 3 * spec.hidden_size * spec.intermediate_size
        head = spec.hidden_size * padded_vocab(spec.vocab_size)
        # Tied or not, both ends of a pipeline hold the matrix.
        in_memory, computed = spec.num_layers * layer + 2 * head, spec.num_layers * layer + head
        return cls(layer / in_memory + layer / computed, head / in_memory, head / in_memory + head / computed)

    def stage(self, layers: int, *, first: bool, last: bool) -> float:
        """The cost of a stage of so many layers."""
        return layers * self.layer + (self.embedding if first else 0.0) + (self.head if last else 0.0)


def _reference_counts(num_layers: int, pp: int) -> list[int]:
    base, extra = divmod(num_layers, pp)
    return [base + (pp - 1 - extra <= stage < pp - 1) for stage in range(pp)]
