"""Ranks that live and get nowhere, by their progress cells. A rank that is slow but moves is never reported."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from lockstep.distributed.progress import ProgressBoard, rank_list
from lockstep.executor import failure
from lockstep.executor.contract import ExecutorError
from lockstep.executor.gather import RemoteRank
from lockstep.executor.operations import Operations
from lockstep.executor.spawn import WorkerProcess

STALE_S = 0.8  # without a sign of life (ranks give one every 0.2 s), ask the kernel whether it is stopped
ANSWER_GRACE_S = 2.0  # how long ranks that make no progress may owe an answer after another rank raised
Ranks = Sequence[WorkerProcess | RemoteRank]


class Stall:
    """Asked every tick. It only looks: what is to be done is the fleet's."""

    def __init__(self, board: ProgressBoard, operations: Operations) -> None:
        self._board, self._operations = board, operations

    def stopped(self, workers: Ranks) -> int | None:
        """A rank without a sign of life that the kernel calls stopped."""
        for worker, progress in zip(workers, self._board.all(), strict=True):
            if progress.beat_age_s > STALE_S and worker.state() == "T":
                return worker.rank
        return None

    def explain(self, rank: int, workers: Ranks, order: str) -> Callable[[], ExecutorError]:
        """The error of a stopped rank: where all are is noted now, its last lines when the error is made, with its stack.

        order: the oldest that is not answered, "" for none.
        """
        worker, progress = workers[rank], self._board.read(rank)
        others = self._board.describe([w.rank for w in workers if w is not worker])
        return lambda: failure.stopped(rank, progress, others, list(worker.tail.lines), order, worker.where)

    def starting(self, workers: Ranks, limit_s: float) -> str:
        """Who is not ready, in words."""
        missing = [w.rank for w in workers if not w.ready]
        return f"starting ({rank_list(missing)} not ready, startup_timeout_seconds={limit_s:g})"

    def half_answered(self, workers: Ranks) -> ExecutorError | None:
        """A call in which a rank raised and the others are stuck: the exception is why."""
        call = self._operations.half_answered(ANSWER_GRACE_S)
        if call is None or self._still_s() <= ANSWER_GRACE_S:
            return None
        rank, answer = call.raised[0]
        late = sorted(call.missing)
        error = failure.raised(rank, answer, list(workers[rank].tail.lines), where=workers[rank].where)
        error.args = (f"{error} ({rank_list(late)} did not answer the same call: {self._board.describe(late)})",)
        return error

    def hung(self, now: float) -> tuple[str, float] | None:
        """(order, seconds) for which no rank made progress, where that is longer than the order's limit."""
        operation = self._operations.oldest()
        if operation is None:
            return None
        quiet_s = min(self._still_s(), now - self._operations.oldest_since)
        return (operation.what, quiet_s) if quiet_s > operation.limit_s else None

    def _still_s(self) -> float:
        return min(progress.age_s for progress in self._board.all())
