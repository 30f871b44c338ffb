"""One calibrated machine as a cluster: its ranks share cores and memory, so a layout is priced and fitted whole.

`lockstep calibrate` measures one rank on all cores, and two that share them. Layouts of so many ranks are the space; steps come
from `cpu.py`, memory from `cpu_memory.py`: what a rank of the engine takes here, not what one of a GPU would.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import ClassVar

from lockstep.planner import cpu_memory
from lockstep.planner.calibration import DISTURBED, MEASURED, Calibration
from lockstep.planner.cpu import CpuModel, OpTime
from lockstep.planner.hardware import ErrorBand
from lockstep.planner.host_load import ClosedReplica
from lockstep.planner.layer import Setting, Work
from lockstep.planner.layout import Layout
from lockstep.planner.load import Replica, Serving
from lockstep.planner.memory import LIBRARY_BYTES, RankMemory, kv_bytes_per_token
from lockstep.planner.ranks import RankGroup, alike
from lockstep.planner.search import Search
from lockstep.planner.step import Pricer, Step
from lockstep.planner.terms import Term, merge

SHORT = 64  # output tokens
CLOSE = 0.6  # of the rate that a layout can carry at all
ROUGH = ErrorBand(operation=MEASURED.operation, tpot=0.60, ttft=0.40)  # of the analytic load against the scheduler's own
ENGINE_ONLY = "times are of the engine alone: what the printed server adds for HTTP, tokenizing and streaming is not in them"
SCHEDULED = (
    "the formulas of load are rough for stages, short answers at a rate, and a rate near the most: --simulate is nearer, by the same steps"
)
SOURCE = "docs/planner_cpu.md#the-step-of-a-stage"
SERVING = Serving(arrival_s=0.0, queue=0.0, calibrated=True)  # steps hold the engine's own share; nothing is added for the server
PRODUCT = "launch + edge (n + k) + work n k"
FORMULAS = {
    "qkv": PRODUCT,
    "out": PRODUCT + " + finish n",
    "gate and up": PRODUCT + " + gate n / 2",
    "down": PRODUCT + " + finish n",
    "head": PRODUCT,
    "attention": "base + bytes of keys and values + pairs x heads x (head width, and 1)",
    "engine, executor and worker": "base + per request + per prompt that begins + per prompt token",
    "sums over the ranks": "base + per value",
}


class HostPricer(Pricer):
    """Prices from the machine's own steps. Unlike devices that stand apart, ranks slow each other down: `dp` counts too."""

    def __init__(self, setting: Setting, found: Calibration) -> None:
        super().__init__(setting)
        self.found = found
        self._whole: dict[tuple[Layout, Work], Step] = {}

    def model(self, layout: Layout, *, alone: bool = False) -> CpuModel:
        """The machine's steps of this layout. alone: one request, so that other stages wait."""
        return CpuModel(self.found, self.setting.shape, layout, how="even", weight_dtype=self.setting.weight_dtype, alone=alone)

    def step(self, layout: Layout, work: Work) -> Step:
        """The times of one step."""
        kept = self._whole.get((layout, work))
        if kept is None:
            stages = self._stage_s(layout, work)
            hop = self.model(layout).hop_s(work.tokens) * (layout.pp - 1)
            kept = self._whole[layout, work] = Step(sum(stages) + hop, max(stages), hop)
        return kept

    def _stage_s(self, layout: Layout, work: Work) -> list[float]:
        queries, contexts = rows_of(work)
        return self.model(layout, alone=_alone(layout, work)).stage_s(queries, contexts, len(queries))

    def terms(self, layout: Layout, work: Work) -> list[Term]:
        """The terms of one micro-batch through all stages."""
        queries, contexts = rows_of(work)
        model, found = self.model(layout, alone=_alone(layout, work)), []
        for stage in range(layout.pp):
            for op in model.operations(stage, queries, contexts, len(queries)):
                found.append(self._term(op, FORMULAS.get(op.name, "base + per element")))
        if layout.pp > 1:
            hops = model.hop_s(work.tokens) * (layout.pp - 1)
            found.append(self._term(OpTime("hops between stages", hops), "(p-1)(base + per byte)"))
        return merge(found)

    def _term(self, op: OpTime, formula: str) -> Term:
        error = op.error or self.setting.device.band.operation
        return Term(op.name, op.seconds, formula=formula, source=SOURCE, table_s=op.table * op.seconds, error_s=error * op.seconds)


def _alone(layout: Layout, work: Work) -> bool:
    """Whether other stages wait for this step."""
    return work.decode and work.tokens == 1 and layout.dp == 1


def rows_of(work: Work) -> tuple[list[int], list[int]]:
    """(new tokens, tokens held afterwards) of each request of a step."""
    if work.decode:
        return [1] * work.tokens, [round(work.context) + 1] * work.tokens
    each, more = divmod(work.tokens, work.prompts)
    queries = [each + (i < more) for i in range(work.prompts)]
    return queries, [round(work.context) + n for n in queries]


@dataclass(frozen=True)
class HostSearch(Search):
    """The search on one machine: every deployment is all of its replicas, and there is room for one."""

    grows: ClassVar[bool] = False

    @property
    def found(self) -> Calibration:
        pricer = self.pricer
        assert isinstance(pricer, HostPricer)
        return pricer.found

    def replica(self, layout: Layout, chunk: int) -> Replica:
        kind = ClosedReplica if self.work.rate is None else Replica
        return kind(self.pricer, layout, self.work, chunk, self.serving)

    def band(self, layout: Layout, chunk: int) -> ErrorBand:
        """Wider where the formulas of load are further off than the steps: stages, and at a rate short answers, and near the most."""
        rate = self.work.rate
        rough = layout.pp > 1 or (rate is not None and (self.work.output_len < SHORT or rate > CLOSE * self._most(layout, chunk)))
        return ROUGH if rough else self.pricer.setting.device.band

    def notes(self, layout: Layout, chunk: int) -> list[str]:
        """What a reader should know about numbers of this machine."""
        found = [ENGINE_ONLY]
        if self.band(layout, chunk).tpot > self.pricer.setting.device.band.tpot:
            found.append(SCHEDULED)
        if (longer := self.found.mode(layout.devices).disturbed) > DISTURBED:
            found.append(
                f"times are of the machine by itself: meanwhile something else made steps of the usual round x{longer:.2f} as long"
            )
        return found

    def _most(self, layout: Layout, chunk: int) -> float:
        """Requests per second that the layout can carry, whatever the latencies."""
        replica = self.replica(layout, chunk)
        return layout.dp * replica.at(max(1, min(self.room(layout, chunk)[0], replica.most))).rate

    def with_setting(self, setting: Setting) -> Search:
        return replace(self, pricer=HostPricer(setting, self.found))

    def at_most(self, layout: Layout) -> int:
        return 1

    def devices(self, layout: Layout) -> int:
        return 1

    def fullest(self, layout: Layout, chunk: int, rows: int) -> tuple[int, RankMemory]:
        """(bytes free for KV, memory) of the rank with room for the fewest tokens, when all ranks share the machine evenly."""
        capacity = int(self.pricer.setting.device.capacity_bytes * self.memory_share) // layout.devices
        ranks = [self._rank(layout, stage, rank, chunk, rows) for stage in range(layout.pp) for rank in range(layout.tp)]
        return min(((capacity - rank.fixed, rank) for rank in ranks), key=lambda each: each[0] / each[1].kv_per_token)

    def ranks(self, layout: Layout, chunk: int, rows: int) -> list[RankGroup]:
        found = {(i, j): self._rank(layout, i, j, chunk, rows) for i in range(layout.pp) for j in range(layout.tp)}
        stages = alike(tuple(found[i, j] for j in range(layout.tp)) for i in range(layout.pp))
        return [RankGroup(a, b, found[a[0], b[0]]) for a in stages for b in alike(found[a[0], j] for j in range(layout.tp))]

    def _rank(self, layout: Layout, stage: int, rank: int, chunk: int, rows: int) -> RankMemory:
        s, granule = self.pricer.setting, cpu_memory.AMX_GRANULE if "amx" in self.found.kernels else cpu_memory.PAIR
        sizes = cpu_memory.StepSizes(chunk + rows, rows * layout.pp, rows, self.work.longest)
        return RankMemory(
            cpu_memory.weight_bytes(s.shape, layout, stage, rank, how="even", weight_dtype=s.weight_dtype, granule=granule),
            kv_bytes_per_token(s.shape, layout, stage, rank),
            cpu_memory.activation_bytes(s.shape, layout, stage, rank, sizes) + cpu_memory.batch_bytes(sizes),
            cpu_memory.exchange_bytes(layout) + LIBRARY_BYTES,
        )

    @cached_property
    def layouts(self) -> list[Layout]:
        """Layouts of as many ranks as were measured."""
        shape, found = self.pricer.setting.shape, []
        for ranks in sorted({mode.ranks for mode in self.found.modes}):
            for tp in (n for n in range(1, ranks + 1) if ranks % n == 0 and n <= min(shape.num_heads, shape.intermediate_size)):
                left = ranks // tp
                found += [Layout(tp, pp, left // pp) for pp in range(1, left + 1) if left % pp == 0 and pp <= shape.num_layers]
        return found
