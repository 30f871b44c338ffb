"""What the engine asks of whatever runs its steps. Torch-free: this is all of the executor that the engine imports."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from lockstep.observability.timeline import Timeline
from lockstep.observability.trace import Profile, Track
from lockstep.protocol import RankLive, RankMemory, StepPlan, StepResult
from lockstep.protocol.health import RankHealth

__all__ = ["Executor", "ExecutorError", "RankMemory", "StepFuture"]


class StepFuture(Protocol):
    """A step that is running. FIFO: a later step never completes before an earlier one."""

    def done(self) -> bool: ...

    def result(self, timeout: float | None = None) -> StepResult:
        """The step's result, as often as it is asked for. Raises ExecutorError (a rank died, hung or raised), TimeoutError after
        `timeout` s; the step goes on then, and may be waited for again."""
        ...


class ExecutorError(RuntimeError):
    """The ranks can no longer run steps. The message names rank, phase, cause and the rank's last log lines.

    rank: the culprit, or None where no single rank is to blame. phase: what it was doing (init, load, step 12, ...).
    exitcode: as `subprocess` gives it (negative: killed by that signal), None when the process lives.
    kind: "died", "stopped" (SIGSTOP), "hung", "raised", "lost" (a whole host), "absent" (a host that did not come in time),
    "refused" (a host that does not fit) or "shutdown". error_type: the exception's type, for "raised". log_tail: the rank's last
    lines, and Python stacks. out_of_memory: the kernel's killer did it. ranks: where all of them were. incident: the file that
    tells the whole story.
    """

    def __init__(
        self,
        message: str,
        *,
        rank: int | None = None,
        phase: str = "",
        exitcode: int | None = None,
        kind: str = "died",
        error_type: str = "",
        log_tail: Sequence[str] = (),
        out_of_memory: bool = False,
        ranks: Sequence[RankHealth] = (),
    ) -> None:
        super().__init__(message)
        self.rank, self.phase, self.exitcode, self.kind = rank, phase, exitcode, kind
        self.error_type, self.log_tail = error_type, list(log_tail)
        self.out_of_memory, self.ranks, self.incident = out_of_memory, list(ranks), ""


class Executor(ABC):
    """Runs steps on every rank.

    Life: construct (ranks start, load the model, and are ready) -> memory() -> initialize_kv_cache(n) -> steps ->
    shutdown(). The constructor raises ExecutorError when a rank does not get ready. After any ExecutorError every later
    call raises it again. All methods may be called from one thread at a time.
    """

    max_concurrent_batches: int = 1  # steps that may be in flight at once
    timeline = Timeline()  # of this process; each executor that can be recorded makes its own, this one never starts

    @abstractmethod
    def memory(self) -> list[RankMemory]:
        """Every rank's memory, by rank."""

    @abstractmethod
    def initialize_kv_cache(self, num_blocks: int) -> None:
        """Allocate `num_blocks` KV blocks on every rank. Called once, before the first step."""

    @abstractmethod
    def execute_model(self, plan: StepPlan) -> StepFuture:
        """Start a step on every rank. At most `max_concurrent_batches` may be unfinished."""

    @abstractmethod
    def collective_rpc(
        self, method: str, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None, timeout: float | None = None
    ) -> list[Any]:
        """Call a worker's method by name on every rank; the results by rank.

        Arguments and results are plain data (msgspec encodes them). A reply always belongs to its own call. Raises
        ExecutorError kind "raised" when any rank raised (the executor lives on: the exception was answered by all),
        TimeoutError after `timeout` seconds (a late reply is dropped, never taken for another call's).
        """

    def health(self) -> list[RankHealth]:
        """Every rank at this moment, by rank, as far as it is known here. From any thread; waits for nothing."""
        return []

    def start_timelines(self) -> None:
        """Record what this process and every rank do from now on."""
        self.collective_rpc("start_timeline")
        self.timeline.start()

    def take_timelines(self) -> Profile:
        """Stop; what was recorded since the start."""
        engine = Track("engine", self.timeline.take(), self.timeline.left_out)
        answers = enumerate(self.collective_rpc("take_timeline"))
        return Profile([engine, *(Track(f"rank {rank}", rows, left_out) for rank, (rows, left_out) in answers)])

    def live(self) -> list[RankLive]:
        """What each rank is doing and what its time went into, by rank, without asking any; [] where that is not known."""
        return []

    @abstractmethod
    def check_health(self) -> None:
        """Raise the ExecutorError if the ranks can no longer run."""

    @abstractmethod
    def register_failure_callback(self, callback: Callable[[ExecutorError], None]) -> None:
        """Call back once, from any thread, when the executor fails; at once if it already has."""

    def say_again(self) -> None:  # noqa: B027 - most have no other hosts
        """From here on this process is followed by another when it fails: hosts that only have ranks of it wait for that one then."""

    def give_up(self, error: Exception) -> None:
        """As `shutdown`, at once, for something that went wrong above the ranks: those who run some for this process are told what, and
        else would take its end for one in good order. What failed by itself has told them its own reason."""
        del error
        self.shutdown()

    @abstractmethod
    def shutdown(self) -> None:
        """Stop every rank and release everything. Never raises, may be called twice."""
