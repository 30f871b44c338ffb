"""A step over the whole pipeline: layer terms times layers, the ends of the model, hops between stages, and what idles.

`Pricer` keeps what layers cost by (layout without pipeline, work): a search asks the same again for every depth. The same
terms give the fast numbers and the explanation, so they agree by construction.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import NamedTuple

from lockstep.distributed.partition import vocab_shard
from lockstep.planner import collectives, ops
from lockstep.planner.layer import LINK, MEMORY, MESSAGES, Groups, Setting, Work, attention_terms, layer_terms, mlp_terms, product, term
from lockstep.planner.layout import Layout, crossings
from lockstep.planner.memory import stages
from lockstep.planner.terms import Term, merge, total_s

Kind = tuple[bool, int]  # (has experts, window)


class Stage(NamedTuple):
    """What a pipeline stage holds."""

    kinds: tuple[tuple[Kind, int], ...]  # (kind, number of its layers)
    first: bool
    last: bool


class Alike(NamedTuple):
    """Stages that hold the same: one of them, where it is, and how many there are."""

    stage: Stage
    place: int
    number: int


@dataclass(frozen=True)
class Step:
    """A step's time over the stages: `sum_s` for one micro-batch through all of them, `beat_s` for the slowest one."""

    sum_s: float
    beat_s: float
    hop_s: float  # of sum_s, the messages between stages

    def round_s(self, in_flight: int) -> float:
        """How long until each of `in_flight` micro-batches has passed every stage once more (steady decode).

        One token of each: the slowest stage works min(1, in_flight / stages) of the time.
        """
        return max(self.sum_s, in_flight * self.beat_s)

    def drain_s(self, batches: int) -> float:
        """How long until `batches` micro-batches that enter one after the other have left (a prompt's chunks: fill and drain)."""
        return self.sum_s + (batches - 1) * self.beat_s


class Pricer:
    """Prices of one setting, kept."""

    def __init__(self, setting: Setting) -> None:
        self.setting = setting
        self._layers: dict[tuple[object, ...], float] = {}
        self._steps: dict[tuple[object, ...], Step] = {}
        self._stages: dict[int, tuple[Stage, ...]] = {}
        self._different: dict[int, tuple[Alike, ...]] = {}
        self._groups: dict[Layout, Groups] = {}

    def groups(self, layout: Layout) -> Groups:
        """Where the layout's groups lie."""
        found = self._groups.get(layout)
        if found is None:
            found = self._groups[layout] = Groups.of(layout, self.setting.cluster.devices_per_node)
        return found

    def stages(self, pp: int) -> tuple[Stage, ...]:
        """The stages, layers dealt out evenly."""
        if pp not in self._stages:
            kinds, parts = self.setting.shape.kinds, stages(self.setting.shape, pp)
            self._stages[pp] = tuple(
                Stage(tuple(Counter(kinds[part.start : part.stop]).items()), i == 0, i == pp - 1) for i, part in enumerate(parts)
            )
        return self._stages[pp]

    def different(self, pp: int) -> tuple[Alike, ...]:
        """The stages, those that are alike once."""
        found = self._different.get(pp)
        if found is None:
            stages = self.stages(pp)
            found = self._different[pp] = tuple(Alike(stage, stages.index(stage), count) for stage, count in Counter(stages).items())
        return found

    def step(self, layout: Layout, work: Work) -> Step:
        """The times of one step."""
        groups = self.groups(layout)
        key = (layout.tp, layout.pp, layout.cp, layout.dcp, layout.ep, groups.ep, work)
        found = self._steps.get(key)
        if found is None:
            found = self._steps[key] = self._step(layout, groups, work)
        return found

    def _step(self, layout: Layout, groups: Groups, work: Work) -> Step:
        ends = {True: self._end_s(layout, work, first=True), False: self._end_s(layout, work, first=False)}
        total, beat = 0.0, 0.0
        for stage, _, number in self.different(layout.pp):
            seconds = sum([count * self._layer_s(layout, groups, work, kind) for kind, count in stage.kinds])
            seconds += (ends[True] if stage.first else 0.0) + (ends[False] if stage.last else 0.0)
            total, beat = total + number * seconds, max(beat, seconds)
        hop = total_s(hop_terms(self.setting, layout, groups, work))
        return Step(total + hop, beat, hop)

    def _layer_s(self, layout: Layout, groups: Groups, work: Work, kind: Kind) -> float:
        """A layer's two halves: what differs in experts alone has the same attention, and the MLP does not see the context."""
        routed, window = kind
        one = (layout.tp, layout.cp, layout.dcp, work, window)
        attention = self._layers.get(one)
        if attention is None:
            attention = self._layers[one] = sum(t.seconds for t in attention_terms(self.setting, layout, groups, work, window))
        experts = (layout.ep, groups.ep) if routed else None
        two = (layout.tp, layout.cp, experts, work.decode, work.tokens)
        mlp = self._layers.get(two)
        if mlp is None:
            mlp = self._layers[two] = sum(t.seconds for t in mlp_terms(self.setting, layout, groups, work, routed))
        return attention + mlp

    def _end_s(self, layout: Layout, work: Work, *, first: bool) -> float:
        key = (layout.tp, layout.cp, work, first)
        found = self._layers.get(key)
        if found is None:
            found = self._layers[key] = total_s(end_terms(self.setting, layout, self.groups(layout), work, first=first))
        return found

    def terms(self, layout: Layout, work: Work) -> list[Term]:
        """The terms of one micro-batch through all stages; they add up to `step(...).sum_s`."""
        groups, found = self.groups(layout), []
        totals: Counter[Kind] = Counter()
        for stage in self.stages(layout.pp):
            totals.update(dict(stage.kinds))
        for kind, count in totals.items():
            found += [t.times(count) for t in layer_terms(self.setting, layout, groups, work, *kind)]
        for first in (True, False):
            found += end_terms(self.setting, layout, groups, work, first=first)
        return merge([*found, *hop_terms(self.setting, layout, groups, work)])


def end_terms(s: Setting, layout: Layout, groups: Groups, work: Work, *, first: bool) -> list[Term]:
    """What the first stage does before its layers (look rows up), or the last one after them (norm, head, gather)."""
    shape, span = s.shape, groups.tp
    here = work.tokens if work.decode else -(-work.tokens // layout.cp)
    wide = here * shape.hidden_size * shape.itemsize
    if first:
        found = [term(s, "embedding", ops.elementwise_s(s.device, 2.0 * wide, 1), 0.0, 2.0 * wide, "t0 + bytes / (BW e_b)", MEMORY)]
        if span.size > 1:
            seconds = collectives.all_reduce_s(s.cluster, *span, wide)
            found.append(term(s, "all-reduce after the embedding", seconds, 0.0, 2.0 * wide, f"{LINK} + 2(n-1)/n S / B", MESSAGES))
        return found
    rows = work.tokens if work.decode else 1
    head = product(Setting(shape, s.cluster), "head", rows, vocab_shard(shape.vocab_size, layout.tp, 0).size, shape.hidden_size)
    if span.size == 1:
        return [head]
    size = float(rows * shape.vocab_size * shape.itemsize)
    seconds = collectives.all_gather_s(s.cluster, *span, size)
    return [head, term(s, "gathering logits", seconds, 0.0, size, f"{LINK} + (n-1)/n S / B", MESSAGES)]


def hop_terms(s: Setting, layout: Layout, groups: Groups, work: Work) -> list[Term]:
    """The residual stream from stage to stage: every TP rank sends its part, and the receivers join them."""
    if layout.pp == 1:
        return []
    here = work.tokens if work.decode else -(-work.tokens // layout.cp)
    size = here * s.shape.hidden_size * s.shape.itemsize
    part, across = size / layout.tp, crossings(layout, s.cluster.devices_per_node)
    inside = layout.pp - 1 - across
    seconds = inside * collectives.p2p_s(s.cluster, part, "inside") + across * collectives.p2p_s(s.cluster, part, "between")
    terms = [term(s, "hops between stages", seconds, 0.0, (layout.pp - 1) * part, f"(p-1)({LINK} + S / (tp B))", MESSAGES)]
    if groups.tp.size > 1:
        join = collectives.all_gather_s(s.cluster, *groups.tp, size)
        terms.append(
            term(s, "joining the stream", join * (layout.pp - 1), 0.0, (layout.pp - 1) * size, f"(p-1)({LINK} + (n-1)/n S / B)", MESSAGES)
        )
    return terms
