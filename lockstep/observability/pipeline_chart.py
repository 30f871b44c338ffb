"""A pipeline's schedule out of recorded timelines: stage x time as text, the idle share measured, and what theory allows.

Notation: p stages, m micro-batches, t_s the mean time that stage s computes on one.

1. Bounded work (a prefill): filling and draining take (p - 1) turns, so that (p - 1) / (p + m - 1) of the time is idle when
   all stages take alike (Huang et al., GPipe, 2019). With unequal stages the slowest sets the beat: the whole takes
   sum(t) + (m - 1) * max(t), of which each stage works m * t_s.
2. Steady decode: a micro-batch comes back to the first stage when it has left the last one, so with m in flight a turn takes
   max(max(t), sum(t) / m), which leaves 1 - min(1, m / p) idle when all stages take alike.
3. Both are of mean times. No two steps take quite alike, and a stage waits for the slower one each time: `Schedule.played` has the
   recorded times one by one, on stages that hand over in no time. What is idle beyond that is ours.
"""

from __future__ import annotations

import re
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from lockstep.observability.trace import Profile

WIDTH = 96  # columns of time
SHOWN_STEPS = 4  # steps in the picture, per stage
_MARKS = "0123456789"

Span = tuple[float, float, int]  # began_s, ended_s, step


@dataclass(frozen=True)
class Schedule:
    """When each stage computed. busy: by stage, its spans in order; the waits inside a step are cut out."""

    busy: Sequence[Sequence[Span]]

    @classmethod
    def of(cls, profile: Profile, stages: int, stage_size: int, prefix: str = "") -> Schedule:
        """From a recorded run: each stage by its first rank. prefix: of the ranks' names, where there are several replicas."""
        tracks = {track.name: track.rows for track in profile.tracks}
        found = []
        for stage in range(stages):
            rows = tracks[f"{prefix}rank {stage * stage_size}"]
            waits = sorted((began, ended) for _, category, began, ended, _, _ in rows if category == "idle")
            steps = [(began, ended, step) for name, _, began, ended, step, _ in rows if re.fullmatch(r"step \d+", name)]
            found.append([part for span in sorted(steps) for part in _without(span, waits)])
        return cls(found)

    @property
    def window(self) -> tuple[float, float]:
        """From the first work of any stage to the last, seconds."""
        every = [span for spans in self.busy for span in spans]
        return (min(s[0] for s in every), max(s[1] for s in every)) if every else (0.0, 0.0)

    def middle(self, share: float = 0.5) -> Schedule:
        """The part in the middle in which every stage is in its stride: that share of the steps, without filling and draining."""
        steps = sorted({step for _, _, step in self.busy[-1]})
        skipped = int(len(steps) * (1 - share) / 2)
        first, last = steps[skipped], steps[len(steps) - 1 - skipped]
        began = min(b for b, _, step in self.busy[-1] if step == first)
        ended = max(e for _, e, step in self.busy[0] if step == last)
        cut = [[(max(b, began), min(e, ended), s) for b, e, s in spans if b < ended and e > began] for spans in self.busy]
        return Schedule(cut)

    @property
    def micro_batches(self) -> int:
        """Steps that the last stage worked on."""
        return len({step for _, _, step in self.busy[-1]})

    def played(self, in_flight: int | None = None) -> Schedule:
        """The same work where it takes no time to hand over: a step begins when its stage is free, it has left the stage before, and
        the step that is `in_flight` before it has left the last one (None: nothing comes back)."""
        work = [defaultdict[int, float](float) for _ in self.busy]
        for seconds, spans in zip(work, self.busy, strict=True):
            for began, ended, step in spans:
                seconds[step] += ended - began
        ends, left, played = [0.0] * len(work), list[float](), [list[Span]() for _ in work]
        for i, step in enumerate(sorted({step for seconds in work for step in seconds})):
            at_s = left[i - in_flight] if in_flight is not None and i >= in_flight else 0.0
            for stage, seconds in enumerate(work):
                began = max(ends[stage], at_s)
                at_s = ends[stage] = began + seconds[step]
                played[stage].append((began, at_s, step))
            left.append(at_s)
        return Schedule(played)

    def mean_s(self) -> list[float]:
        """Seconds of work on one micro-batch, by stage."""
        return [sum(e - b for b, e, _ in spans) / max(1, len({s for _, _, s in spans})) for spans in self.busy]

    def idle_shares(self) -> list[float]:
        """The share of the window in which each stage did not work."""
        began, ended = self.window
        return [1.0 - sum(e - b for b, e, _ in spans) / max(ended - began, 1e-12) for spans in self.busy]

    def idle_share(self) -> float:
        """The same of all stages together."""
        return sum(self.idle_shares()) / len(self.busy)

    def picture(self) -> str:
        """Stage x time: each column the step that the stage worked on for most of it, `.` where it idled. A part from the middle."""
        began, ended = self.window
        steps = sorted({step for _, _, step in self.busy[-1]})
        count = SHOWN_STEPS * len(self.busy)
        if len(steps) > count:
            at = (len(steps) - count) // 2
            chosen = set(steps[at : at + count])
            parts = [span for spans in self.busy for span in spans if span[2] in chosen]
            began, ended = min(s[0] for s in parts), max(s[1] for s in parts)
        column_s = max(ended - began, 1e-9) / WIDTH
        lines = [f"stage x time ({column_s * 1e3:.3g} ms a column; a step by its last digit, . is idle)"]
        for stage, spans in enumerate(self.busy):
            cells = [_cell(spans, began + i * column_s, began + (i + 1) * column_s) for i in range(WIDTH)]
            lines.append(f"  {stage} |{''.join(cells)}|")
        return "\n".join(lines)

    def summary(self, in_flight: int) -> str:
        """The picture, and the idle shares measured and predicted. in_flight: micro-batches that the engine keeps in flight."""
        stages, m, means = len(self.busy), self.micro_batches, self.mean_s()
        shares = ", ".join(f"stage {i} {share:.1%}" for i, share in enumerate(self.idle_shares()))
        times = ", ".join(f"{mean * 1e3:.3g} ms" for mean in means)
        fill = (stages - 1) / (stages + m - 1) if m else 0.0
        return "\n".join(
            [
                self.picture(),
                f"idle, measured: {self.idle_share():.1%} ({shares}); work on a micro-batch, by stage: {times}",
                f"idle, if {m} micro-batches fill and drain {stages} stages: {bounded_idle(means, m):.1%} with these times, "
                f"{fill:.1%} = (p-1)/(p+m-1) with equal ones",
                f"idle, if {in_flight} are always in flight: {steady_idle(means, in_flight):.1%} with these times, "
                f"{1 - min(1.0, in_flight / stages):.1%} with equal ones",
                f"idle, if each step takes the time it took and is handed on in no time: {self.played().idle_share():.1%} if none needs a "
                f"token of another (prompts), {self.played(in_flight).idle_share():.1%} if each needs those of {in_flight} before (decode)",
            ]
        )


def bounded_idle(means_s: Sequence[float], micro_batches: int) -> float:
    """The idle share of `micro_batches` that fill and drain a pipeline whose stages take `means_s` each."""
    whole = sum(means_s) + (micro_batches - 1) * max(means_s, default=0.0)
    return 1.0 - micro_batches * sum(means_s) / (len(means_s) * whole) if whole > 0 and micro_batches else 0.0


def steady_idle(means_s: Sequence[float], in_flight: int) -> float:
    """The idle share where `in_flight` micro-batches go round for ever."""
    turn = max(max(means_s, default=0.0), sum(means_s) / max(in_flight, 1))
    return 1.0 - sum(means_s) / len(means_s) / turn if turn > 0 else 0.0


def _without(span: Span, waits: Sequence[tuple[float, float]]) -> list[Span]:
    """The parts of a span outside the waits inside it."""
    at, ended, step = span
    parts = []
    for wait_began, wait_ended in waits[bisect_left(waits, (at, 0.0)) : bisect_left(waits, (ended, 0.0))]:
        if wait_began >= at and wait_ended <= ended:
            if wait_began > at:
                parts.append((at, wait_began, step))
            at = wait_ended
    return [*parts, (at, ended, step)] if ended > at else parts


def _cell(spans: Sequence[Span], began: float, ended: float) -> str:
    most, mark = (ended - began) / 2, "."
    for span_began, span_ended, step in spans:
        inside = min(ended, span_ended) - max(began, span_began)
        if inside > most:
            most, mark = inside, _MARKS[step % 10]
    return mark
