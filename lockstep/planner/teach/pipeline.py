"""Pipeline parallelism: how much of the time stages wait, as algebra and as a schedule that was played through.

p stages, m micro-batches, stage s takes d[s]; all numbers are exact fractions. Two ways to keep the stages busy:

1. Fill and drain (GPipe, Huang et al. 2019; here the forward passes): all m micro-batches go through once, and the pipeline is
   empty before and after. It takes sum(d) + (m - 1) max(d); with equal stages (p - 1) / (p + m - 1) of it is idle: the bubble.
2. Decoding with continuous batching: m groups of requests go round for as long as there is work, each stage one forward after
   the other. A group comes back for its next token when the last one was sampled, so one group passes every
   max(max(d), sum(d) / m); with equal stages that keeps them min(1, m / p) busy. There is no fill and no drain to pay for.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal

from lockstep.config.errors import ConfigError
from lockstep.config.tree import opt
from lockstep.planner.teach.checks import numbers, within
from lockstep.planner.teach.svg import COLOURS, IDLE, Canvas
from lockstep.planner.teach.table import percent, table

Time = Fraction | int
WIDEST = 160  # columns of a grid in a terminal
NAMES = "0123456789abcdefghijklmnopqrstuvwxyz"


@dataclass(frozen=True)
class Options:
    """Which pipeline to play through."""

    stages: int = opt(4, "Pipeline stages, p.", "-pp")
    micro_batches: int = opt(8, "Micro-batches (decode: groups of requests in flight), m.", "-m")
    schedule: Literal["gpipe", "decode"] = opt("gpipe", "gpipe: fill and drain once; decode: groups that go round (continuous batching).")
    stage_times: str = opt("", "What each stage takes, as 1,1,2,1 or 1,1/2; default: all the same.")
    hop: str = opt("0", "Time from one stage to the next, in the same unit.")
    rounds: int = opt(4, "decode: how many tokens of each group to show.")

    def times(self) -> tuple[Fraction, ...]:
        """The stages' times. Raises ConfigError for settings that fit no pipeline."""
        within("stages", self.stages, 1, 64)
        within("micro_batches", self.micro_batches, 1, 256)
        within("rounds", self.rounds, 1, 64)
        found = numbers("stage_times", self.stage_times) if self.stage_times else (Fraction(1),) * self.stages
        if len(found) != self.stages:
            raise ConfigError(
                f"stage_times={self.stage_times!r} has {len(found)} values for stages={self.stages}: give one for each stage."
            )
        return found

    def hop_time(self) -> Fraction:
        """The time between stages. Raises ConfigError."""
        return numbers("hop", self.hop, zero=True)[0]


@dataclass(slots=True)  # not frozen: there are hundreds of thousands, and freezing takes longer than playing
class Task:
    """One micro-batch on one stage, from `start` until `end`. `round` counts the passes of a group that goes round."""

    stage: int
    micro_batch: int
    round: int
    start: Time
    end: Time


@dataclass(frozen=True)
class Result:
    """A schedule, and its idle share as counted in it and as the formula has it."""

    options: Options
    times: tuple[Fraction, ...]
    tasks: tuple[Task, ...]
    idle_simulated: Fraction
    idle_formula: Fraction
    stage_busy: tuple[Fraction, ...]
    makespan: Fraction


def play(times: Sequence[Time], micro_batches: int, rounds: int = 1, hop: Time = 0) -> list[Task]:
    """Every task, in the order in which they are started on each stage.

    A micro-batch starts on a stage when it has arrived there and the stage is free; stages take them in order of arrival. After
    the last stage it needs one more hop back to the first (the sampled token) before its next round. One round is fill and drain.
    """
    free: list[Time] = [0] * len(times)
    ready: list[Time] = [0] * micro_batches
    tasks = []
    for turn in range(rounds):
        for one in range(micro_batches):
            arrives = ready[one]
            for stage, takes in enumerate(times):
                start = max(arrives, free[stage])
                free[stage] = end = start + takes
                arrives = end + hop
                tasks.append(Task(stage, one, turn, start, end))
            ready[one] = arrives
    return tasks


def bubble(stages: int, micro_batches: int) -> Fraction:
    """The idle share of a fill and drain over equal stages: (p - 1) / (p + m - 1). Not (p - 1) / m, which is idle over work."""
    return Fraction(stages - 1, stages + micro_batches - 1)


def makespan(times: Sequence[Time], micro_batches: int, hop: Time = 0) -> Fraction:
    """Fill and drain over any stages: the first micro-batch passes all of them, each further one waits for the slowest."""
    return Fraction(sum(times) + (len(times) - 1) * hop + (micro_batches - 1) * max(times))


def drain_idle(times: Sequence[Time], micro_batches: int, hop: Time = 0) -> Fraction:
    """The idle share of a fill and drain over any stages; `bubble` when they are equal and the hop is nothing."""
    return 1 - Fraction(micro_batches * sum(times)) / (len(times) * makespan(times, micro_batches, hop))


def beat(times: Sequence[Time], groups: int, hop: Time = 0) -> Fraction:
    """Time between two groups' tokens in steady decoding: the slowest stage, or a whole round shared by the groups in flight."""
    return max(Fraction(max(times)), Fraction(sum(times) + len(times) * hop) / groups)


def steady_busy(times: Sequence[Time], groups: int, hop: Time = 0) -> tuple[Fraction, ...]:
    """The share of steady decoding in which each stage computes; min(1, m / p) for equal stages without hops."""
    return tuple(Fraction(takes) / beat(times, groups, hop) for takes in times)


def counted_idle(tasks: Sequence[Task], stages: int) -> Fraction:
    """The idle share of all stages from the first start to the last end, counted task by task."""
    span = max(task.end for task in tasks) - min(task.start for task in tasks)
    return 1 - Fraction(sum(task.end - task.start for task in tasks)) / (stages * span)


def counted_busy(tasks: Sequence[Task], stages: int, begin: Time, end: Time) -> tuple[Fraction, ...]:
    """Each stage's share of [begin, end) in which it computes, counted task by task."""
    busy: list[Time] = [0] * stages
    for task in tasks:
        busy[task.stage] += max(0, min(task.end, end) - max(task.start, begin))
    return tuple(Fraction(one) / (end - begin) for one in busy)


def steady_window(tasks: Sequence[Task], stages: int, rounds: int) -> tuple[Time, Time]:
    """The last whole round: from when the last stage starts group 0's last token but one until it starts the last."""
    begin, end = (
        next(task.start for task in tasks if task.round == turn and task.micro_batch == 0 and task.stage == stages - 1)
        for turn in (rounds - 2, rounds - 1)
    )
    return begin, end


def micro_batches_for(stages: int, utilisation: Fraction) -> int:
    """The fewest micro-batches that keep equal stages this busy in a fill and drain: m >= u (p - 1) / (1 - u), u below 1."""
    within("utilisation", float(utilisation), 0, 1 - 1e-9)
    return max(1, math.ceil(utilisation * (stages - 1) / (1 - utilisation)))


SETTLE = 12  # rounds before the steady one: far more than uneven stages need to fall in step


def simulate(options: Options) -> Result:
    """Play the schedule and do the algebra. Raises ConfigError for impossible settings."""
    times, m = options.times(), options.micro_batches
    hop = options.hop_time()
    p = len(times)
    if options.schedule == "gpipe":
        tasks = play(times, m, 1, hop)
        span = max(task.end for task in tasks)
        busy = counted_busy(tasks, p, 0, span)
        return Result(options, times, tuple(tasks), counted_idle(tasks, p), drain_idle(times, m, hop), busy, Fraction(span))
    long = play(times, m, SETTLE + options.rounds, hop)
    busy = counted_busy(long, p, *steady_window(long, p, SETTLE + options.rounds))
    shown = tuple(task for task in long if task.round < options.rounds)
    formula = 1 - sum(steady_busy(times, m, hop), Fraction(0)) / p
    return Result(options, times, shown, 1 - sum(busy, Fraction(0)) / p, formula, busy, Fraction(max(task.end for task in shown)))


def unit(tasks: Sequence[Task]) -> Fraction:
    """The longest time of which every start and end is a multiple: one column of the grid."""
    moments = [Fraction(at) for task in tasks for at in (task.start, task.end)]
    scale = math.lcm(*(at.denominator for at in moments))
    return Fraction(math.gcd(*(int(at * scale) for at in moments)), scale)


def grid(tasks: Sequence[Task], stages: int) -> str:
    """Stages down, time across, one character for each unit of time: the micro-batch's name, or a dot for an idle unit."""
    column = unit(tasks)
    columns = int(max(task.end for task in tasks) / column)
    if columns > WIDEST:
        return f"(the grid has {columns} columns, more than {WIDEST}: see --svg)"
    rows = [["."] * columns for _ in range(stages)]
    for task in tasks:
        for at in range(int(task.start / column), int(task.end / column)):
            rows[task.stage][at] = NAMES[task.micro_batch % len(NAMES)]
    return "\n".join(f"stage {stage:<2} {''.join(row)}" for stage, row in enumerate(rows))


def report(result: Result) -> str:
    """The grid, and the idle share twice."""
    o, p = result.options, len(result.times)
    equal = len(set(result.times)) == 1 and not o.hop_time()
    if o.schedule == "gpipe":
        head = f"{p} stages, {o.micro_batches} micro-batches, filled and drained once: {result.makespan} units of time"
        algebra = (
            f"(p-1)/(p+m-1) = {result.idle_formula}" if equal else f"1 - m sum(d) / (p (sum(d) + (m-1) max(d))) = {result.idle_formula}"
        )
        more = [f"9 of 10 units busy need m >= 9 (p-1) = {micro_batches_for(p, Fraction(9, 10))} micro-batches (equal stages)"]
    else:
        head = f"{p} stages, {o.micro_batches} groups of requests going round; the first {o.rounds} tokens of each"
        algebra = f"1 - min(1, m/p) = {result.idle_formula}" if equal else f"1 - mean(d) / max(max(d), sum(d)/m) = {result.idle_formula}"
        more = [f"(steady decoding: {SETTLE} rounds later than shown; what idles above at the start is paid once, not per token)"]
    rows = [(f"stage {i}", str(takes), percent(busy)) for i, (takes, busy) in enumerate(zip(result.times, result.stage_busy, strict=True))]
    agree = "the same" if result.idle_formula == result.idle_simulated else "NOT THE SAME"
    counted = f"idle, counted in the schedule: {result.idle_simulated} = {percent(result.idle_simulated)}"
    return "\n".join(
        (
            head,
            "",
            grid(result.tasks, p),
            "",
            table(("", "takes", "busy"), rows),
            "",
            counted,
            f"idle, by algebra:              {algebra}: {agree}",
            *more,
        )
    )


def picture(result: Result) -> str:
    """The grid as boxes: one row for each stage, one colour for each micro-batch."""
    p, span = len(result.times), float(result.makespan)
    width, tall, left, top = 820.0, 34.0, 76.0, 56.0
    kind = "micro-batches, fill and drain" if result.options.schedule == "gpipe" else "groups going round (decode)"
    canvas = Canvas(left + width + 24, top + p * (tall + 6) + 54, f"{p} stages, {result.options.micro_batches} {kind}")
    for stage in range(p):
        y = top + stage * (tall + 6)
        canvas.text(20, y + 21, f"stage {stage}", kind="b")
        canvas.rect(left, y, width, tall, IDLE)
    for task in result.tasks:
        x, wide = left + width * float(task.start) / span, width * float(task.end - task.start) / span
        y = top + task.stage * (tall + 6)
        canvas.rect(x + 0.5, y, max(0.5, wide - 1), tall, COLOURS[task.micro_batch % len(COLOURS)], f"micro-batch {task.micro_batch}")
        if wide >= 14:
            canvas.text(x + wide / 2, y + 21, task.micro_batch, anchor="middle", kind="w")
    words = f"idle {result.idle_simulated} of the stages' time, counted; by algebra {result.idle_formula}"
    if result.options.schedule == "decode":
        words += " (once steady)"
    canvas.text(left, top + p * (tall + 6) + 22, words)
    canvas.text(left + width, top + p * (tall + 6) + 22, f"time {result.makespan}", anchor="end", kind="s")
    return canvas.svg()
