"""A replica on a calibrated machine under load: its waits are those of the schedule, since nothing of a server is fitted.

Where clients ask again when they are answered, they find a step just begun, and wait for it. So not all of B are in steps at once:
with answers of a few tokens that is a third of them, and prompts come less often than B per `output_len` rounds. How many chunks a
step has, x, follows from Little's law:

    x = B * chunks * step(x) / (TTFT(x) + (output_len - 1) * TPOT(x))

and a request sees the prompts of the B - 1 others. At a rate the formulas are those of any replica.
"""

from __future__ import annotations

from lockstep.planner.layer import Work
from lockstep.planner.layout import Layout
from lockstep.planner.load import Replica, Serving, Workload
from lockstep.planner.step import Pricer

HALVINGS = 24  # of the interval that x lies in


class ClosedReplica(Replica):
    """See `Replica`: the one of a calibrated machine whose clients ask again when they are answered."""

    uneven = False  # prompts come when others end: steps are alike

    def __init__(self, pricer: Pricer, layout: Layout, work: Workload, chunk: int, serving: Serving) -> None:
        super().__init__(pricer, layout, work, chunk, serving)
        self.most_chunks = max(1.0, chunk / self.prompt.tokens)  # of a step
        self._chunks: dict[int, float] = {}  # of a step, by requests at once

    def with_serving(self, serving: Serving) -> Replica:
        other = super().with_serving(serving)
        assert isinstance(other, ClosedReplica)
        other._chunks = {}
        return other

    def chunks_per_step(self, concurrency: int) -> float:
        """The x of Little's law, found by halving: below it more chunks come than steps have, above it fewer."""
        if concurrency not in self._chunks:
            low, high = 0.0, self.most_chunks
            for _ in range(HALVINGS):
                x = self._chunks[concurrency] = (low + high) / 2
                low, high = (x, high) if self._come(concurrency) > x else (low, x)
        return self._chunks[concurrency]

    def _come(self, concurrency: int) -> float:
        """Chunks that come in the time of a step."""
        tpot = self._tpot_s(concurrency)
        ttft = self.prompt_s(concurrency) + self.beside_s(concurrency) + self._step_begun_s(concurrency, tpot)
        return concurrency * self.chunks * self._step_s(concurrency) / (ttft + (self.work.output_len - 1) * tpot)

    def _step_s(self, concurrency: int) -> float:
        """From a step's begin to that of the next one, on average."""
        m = self.in_flight(concurrency)[0]
        decode = self.round_s(concurrency) / m if self.work.streams else 0.0
        return decode + self.prompts_s(self.chunks_per_step(concurrency)) * self.stalls(concurrency)

    def _tpot_s(self, concurrency: int) -> float:
        """As in `at`."""
        return self.serving.step_overhead_s + self.round_s(concurrency) + self.serving.interference * self.others_s(concurrency)

    def decode(self, concurrency: int) -> Work:
        """Requests that wait, or whose prompt is computed, have no row."""
        rows = self.chunks_per_step(concurrency) * (self.work.output_len - 1) / self.chunks
        return Work(True, max(1, round(rows)), self.work.decode_context)

    def round_s(self, concurrency: int) -> float:
        return self.pricer.step(self.layout, self.decode(concurrency)).round_s(self.in_flight(concurrency)[0])

    def others_s(self, concurrency: int) -> float:
        others = self.chunks_per_step(concurrency) * (concurrency - 1) / concurrency
        return self.in_flight(concurrency)[0] * self.prompts_s(others) * self.stalls(concurrency)

    def prompt_s(self, concurrency: int) -> float:
        """Fill and drain, with the prompts that share a step on every stage."""
        x = min(float(self.together), max(1.0, self.chunks_per_step(concurrency)))
        return self.prefill_s + self.layout.pp * (self.prompts_s(x) - self.beat_s)

    def queue_s(self, concurrency: int, tpot_s: float) -> float:
        """Until the first step that has the prompt. Where every step is full of prompts, all that is left of the time by Little's law."""
        begun, x = self._step_begun_s(concurrency, tpot_s), self.chunks_per_step(concurrency)
        if x < self.most_chunks * (1 - 1e-6):
            return begun
        whole = concurrency * self.chunks * self._step_s(concurrency) / x
        return max(begun, whole - self.prompt_s(concurrency) - self.beside_s(concurrency) - (self.work.output_len - 1) * tpot_s)

    def _step_begun_s(self, concurrency: int, tpot_s: float) -> float:
        """The step that has just begun, where there are others to begin one."""
        if concurrency == 1:
            return 0.0
        return (tpot_s if self.work.streams else self.others_s(concurrency)) / self.in_flight(concurrency)[0]

    def waiting(self) -> tuple[str, str]:
        return "waiting for the step in progress", "a step of the others; where all are full, what Little's law leaves"
