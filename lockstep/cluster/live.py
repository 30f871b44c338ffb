"""Replicas and ranks as they are now, made of what replicas report by themselves: rates, means, and who is slow.

A report holds sums. What a rank did lately is the difference of two reports, the last two between which there were steps. A
replica that starts anew begins its sums anew: what it had come to before is kept and added, so that counters never go back.
Who is slow is told twice before it is believed: of JUDGED_STEPS steps or more, and again of the next.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import median

import msgspec

from lockstep.config.tree import ParallelConfig
from lockstep.engine.stats import EngineReport, EngineStats, StepTotals
from lockstep.protocol import RankLive

SLOW_RATIO, SLOW_S = 1.25, 0.001  # of its peers' own work per step, and by at least so much
JUDGED_STEPS = 8  # fewer say little: the first ones after a load, or one that the machine held up
RECENT_S = 5.0  # who is slow is told of work no older than this
GAUGES = ("running", "waiting", "steps_in_flight", "kv_blocks", "kv_blocks_used")


class RankNow(msgspec.Struct, kw_only=True):
    """One rank; the fields of `/v1/cluster`. Times are means of the steps since the report before, in ms."""

    rank: int  # within its replica
    dp: int
    pp: int
    tp: int
    pid: int
    phase: str
    step_ms: float = 0.0
    wait_ms: float = 0.0
    stage_wait_ms: float = 0.0
    bubble: float = 0.0
    memory_bytes: int = 0
    heartbeat_age_s: float | None = None
    slow: bool = False


class ReplicaNow(msgspec.Struct, kw_only=True):
    """One replica; the fields of `/v1/cluster`, and the sums that metrics are made of."""

    replica: int
    state: str
    restarts: int = 0
    report_age_s: float | None = None
    tokens_per_s: float = 0.0
    prompt_tokens_per_s: float = 0.0
    step_ms: float = 0.0
    predicted_step_ms: float | None = None
    ranks: list[RankNow] = []
    stats: EngineStats | None = None  # counters of all its lives
    steps: StepTotals | None = None  # of all its lives
    sums: list[RankLive] = []  # of this life


class Recoveries(msgspec.Struct):
    """Seconds, each of them in the order in which they were over."""

    requests_s: list[float] = []  # from the loss of a request's replica to its next token
    replicas_s: list[float] = []  # from the loss of a replica to its return


@dataclass
class _Replica:
    """What is known of one replica. stats, steps: of lives before this one."""

    stats: EngineStats | None = None
    steps: StepTotals = field(default_factory=StepTotals.empty)
    report: EngineReport | None = None
    heard_s: float = 0.0
    before: EngineReport | None = None  # the one before `report`
    before_s: float = 0.0
    worked: tuple[EngineReport, EngineReport] | None = None  # the last two in a row between which there were steps
    worked_s: float = 0.0  # when the second of them came
    judged: EngineReport | None = None  # the last one that it was asked of who is slow
    suspects: set[int] = field(default_factory=set)  # ranks that were slow in the steps before it
    slow: set[int] = field(default_factory=set)  # and in those before these


class LiveBook:
    """The reports of all replicas. One thread calls it."""

    def __init__(self, parallel: ParallelConfig, replicas: int) -> None:
        self._stage = parallel.stage_size  # ranks of one pipeline stage
        self._first = parallel.first_replica
        self._replicas = [_Replica() for _ in range(replicas)]

    def heard(self, replica: int, report: EngineReport, now_s: float | None = None) -> None:
        """A replica reported."""
        there = self._replicas[replica]
        there.before, there.before_s = there.report, there.heard_s
        there.report, there.heard_s = report, time.monotonic() if now_s is None else now_s
        if there.before is not None and report.stats.steps > there.before.stats.steps:
            there.worked, there.worked_s = (there.before, report), there.heard_s
        self._judge(there, report)

    def _judge(self, there: _Replica, report: EngineReport) -> None:
        judged = there.judged
        if judged is None or len(judged.ranks) != len(report.ranks):
            there.judged = report
        elif report.stats.steps - judged.stats.steps >= JUDGED_STEPS:
            found = slow_ranks(report.ranks, judged.ranks, self._stage)
            there.slow, there.suspects, there.judged = found & there.suspects, found, report

    def lost(self, replica: int) -> None:
        """The replica is gone; what it had come to stays."""
        there = self._replicas[replica]
        if there.report is not None:
            there.stats = _added(there.stats, there.report.stats)
            _add_steps(there.steps, there.report.steps)
        there.report = there.before = there.worked = there.judged = None
        there.suspects, there.slow = set(), set()

    def now(self, replica: int, state: str, restarts: int, now_s: float | None = None) -> ReplicaNow:
        """The replica at this moment. Its state and restarts are the supervisor's to know."""
        there, now_s = self._replicas[replica], time.monotonic() if now_s is None else now_s
        found = ReplicaNow(replica=self._first + replica, state=state, restarts=restarts, stats=there.stats, steps=there.steps)
        report, before = there.report, there.before
        if report is None:
            return found
        age_s = now_s - there.heard_s
        found.report_age_s = age_s
        found.stats = _added(there.stats, report.stats)
        steps = StepTotals.empty()
        _add_steps(steps, there.steps)
        _add_steps(steps, report.steps)
        found.steps, found.sums = steps, report.ranks
        found.ranks = [self._rank(self._first + replica, rank, age_s) for rank in report.ranks]
        if before is not None:
            _rates(found, report, before, there.heard_s - there.before_s)
        if there.worked is not None:
            _steps(found, *there.worked)
            if now_s - there.worked_s <= RECENT_S:  # else nobody waits for anybody any more
                for rank in found.ranks:
                    rank.slow = rank.rank in there.slow
        return found

    def _rank(self, replica: int, rank: RankLive, age_s: float) -> RankNow:
        beat = None if rank.beat_age_s is None else round(rank.beat_age_s + age_s, 3)
        pp, tp = divmod(rank.rank, self._stage)
        return RankNow(
            rank=rank.rank,
            dp=replica,
            pp=pp,
            tp=tp,
            pid=rank.pid,
            phase=rank.phase,
            memory_bytes=rank.memory_bytes,
            heartbeat_age_s=beat,
        )


def _rates(found: ReplicaNow, report: EngineReport, before: EngineReport, seconds: float) -> None:
    stats, last = report.stats, before.stats
    generated = stats.generated_tokens - last.generated_tokens
    found.tokens_per_s = round(generated / seconds, 1)
    found.prompt_tokens_per_s = round(max(0, stats.scheduled_tokens - last.scheduled_tokens - generated) / seconds, 1)


def _steps(found: ReplicaNow, before: EngineReport, report: EngineReport) -> None:
    """Fill in what steps took between two reports."""
    after, last = report.steps, before.steps
    count, busy_s, predicted = after.seconds.count - last.seconds.count, after.busy_s - last.busy_s, after.predicted - last.predicted
    if count:
        found.step_ms = round(1e3 * busy_s / count, 3)
    if predicted:
        found.predicted_step_ms = round(1e3 * (after.predicted_s - last.predicted_s) / predicted, 3)
    if len(report.ranks) == len(before.ranks) == len(found.ranks):
        compare(found.ranks, report.ranks, before.ranks, busy_s)


def compare(found: Sequence[RankNow], after: Sequence[RankLive], before: Sequence[RankLive], busy_s: float) -> None:
    """Fill in what the ranks did between two reports, in which the engine had work for `busy_s`."""
    for now, a, b in zip(found, after, before, strict=True):
        steps, step_s = a.steps - b.steps, a.step_s - b.step_s
        if steps <= 0:
            continue
        wait_s, stage_s = a.wait_s - b.wait_s, a.stage_wait_s - b.stage_wait_s
        now.step_ms, now.wait_ms = round(1e3 * step_s / steps, 3), round(1e3 * wait_s / steps, 3)
        now.stage_wait_ms = round(1e3 * stage_s / steps, 3)
        if busy_s > 0:
            now.bubble = round(min(1.0, max(0.0, 1 - (step_s - stage_s) / busy_s)), 4)


def slow_ranks(after: Sequence[RankLive], before: Sequence[RankLive], stage: int) -> set[int]:
    """The ranks whose own work in a step took longer than that of their peers, between two reports. stage: ranks of one."""
    pairs = [(a, b) for a, b in zip(after, before, strict=True) if a.steps > b.steps]
    work = {a.rank: (a.work_s - b.work_s) / (a.steps - b.steps) for a, b in pairs}  # seconds
    stages: dict[int, list[int]] = {}
    for rank in work:
        stages.setdefault(rank // stage, []).append(rank)
    alone = all(len(ranks) == 1 for ranks in stages.values())
    found = set()
    for rank, own_s in work.items():
        others = [work[other] for other in (work if alone else stages[rank // stage]) if other != rank]
        if others and own_s > max(SLOW_RATIO * median(others), median(others) + SLOW_S):
            found.add(rank)
    return found


def _added(before: EngineStats | None, now: EngineStats) -> EngineStats:
    """Counters of several lives, and what is now."""
    if before is None:
        return now
    names = EngineStats.__struct_fields__
    return EngineStats(**{n: getattr(now, n) + (0 if n in GAUGES else getattr(before, n)) for n in names})


def _add_steps(to: StepTotals, more: StepTotals) -> None:
    to.tokens.add(more.tokens)
    to.seconds.add(more.seconds)
    for name in StepTotals.__struct_fields__[2:]:
        setattr(to, name, getattr(to, name) + getattr(more, name))
