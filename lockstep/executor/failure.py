"""How executors say what went wrong: every message names the rank, what it was doing, the cause and its last words."""

from __future__ import annotations

import signal
from collections import deque
from collections.abc import Sequence
from typing import Protocol

from lockstep.distributed.progress import Progress, rank_list
from lockstep.executor.contract import ExecutorError
from lockstep.executor.wire import Raised
from lockstep.protocol.health import RankHealth
from lockstep.utils import procs

TAIL_LINES = 120
MOST_AGE_S = 1e9  # what "never" is as a number
_LOSS = ("connection", "reset by peer", "gloo", "nccl", "socket", "rendezvous", "store", "of the group", "timed out")


class LogTail:
    """The last lines a rank wrote."""

    def __init__(self) -> None:
        self.lines: deque[str] = deque(maxlen=TAIL_LINES)
        self._rest = b""
        self.seen = 0  # lines in all

    def feed(self, data: bytes) -> list[str]:
        """Add output; the lines it completed."""
        *whole, self._rest = (self._rest + data).split(b"\n")
        lines = [line.decode("utf-8", "replace").rstrip("\r") for line in whole]
        self.add(lines)
        if len(self._rest) > 1 << 16:  # no newline in sight: do not hoard
            lines += self.feed(b"\n")
        return lines

    def add(self, lines: Sequence[str]) -> None:
        """Add whole lines."""
        self.lines.extend(lines)
        self.seen += len(lines)

    def finish(self) -> None:
        """The rank is gone: what it wrote without a newline is a line too."""
        if self._rest:
            self.feed(b"\n")


def phase_of(progress: Progress) -> str:
    """The phase as ExecutorError gives it: "step 12", "load", ..."""
    return f"step {progress.step}" if progress.phase == "step" else progress.phase or "spawn"


def place_of(progress: Progress, order: str) -> str:
    """What a rank was doing. Between orders a rank is idle; `order` ("step 914", "" for none) says what waited for it."""
    return progress.where() + (f" ({order} under way)" if order and progress.phase == "idle" else "")


def died(
    rank: int,
    exitcode: int | None,
    progress: Progress,
    others: str,
    tail: Sequence[str],
    hint: str = "",
    order: str = "",
    where: str = "",
) -> ExecutorError:
    """A process that ended, or (exitcode None) let go of its channel.

    `hint`: what else is known about a SIGKILL. `order`: the oldest that is not answered. `where`: " on node 1 (its host)".
    """
    cause = procs.exit_cause(exitcode) if exitcode is not None else "it closed its reply channel but still runs"
    cause += hint if exitcode == -signal.SIGKILL else ""
    message = f"rank {rank}{where} died in {place_of(progress, order)}: {cause}.{_others(others)}{_quote(rank, tail)}"
    oom = bool(hint) and exitcode == -signal.SIGKILL
    return ExecutorError(message, rank=rank, phase=phase_of(progress), exitcode=exitcode, kind="died", log_tail=tail, out_of_memory=oom)


def stopped(rank: int, progress: Progress, others: str, tail: Sequence[str], order: str = "", where: str = "") -> ExecutorError:
    """A process that was stopped by a signal. `order`: the oldest that is not answered."""
    message = (
        f"rank {rank}{where} was stopped (SIGSTOP, or a debugger) in {place_of(progress, order)}: no sign of life for "
        f"{progress.beat_age_s:.1f} s.{_others(others)}{_quote(rank, tail)}"
    )
    return ExecutorError(message, rank=rank, phase=phase_of(progress), kind="stopped", log_tail=tail)


def hung(what: str, quiet_s: float, all_progress: Sequence[Progress], states: Sequence[str], tail: Sequence[str]) -> ExecutorError:
    """Nobody moves. The culprits are the ranks that got least far; `states` are the kernel's letters, by rank."""
    behind = laggards(all_progress)
    culprit = behind[0] if len(behind) == 1 else None
    places = "; ".join(
        f"rank {r} at {p}" + (", waiting for a device (state D)" if s == "D" else "")
        for r, (p, s) in enumerate(zip(all_progress, states, strict=True))
    )
    blame = f" {rank_list(behind).capitalize()} got least far." if len(behind) < len(all_progress) else ""
    phase = phase_of(all_progress[behind[0]])
    message = f"{what} made no progress for {quiet_s:.1f} s: {places}.{blame}"
    return ExecutorError(message, rank=culprit, phase=phase, kind="hung", log_tail=tail)


def raised(rank: int, answer: Raised, tail: Sequence[str] = (), others: str = "", where: str = "") -> ExecutorError:
    """An exception in a rank. Its traceback is the end of the log tail. `others`: where the other ranks are."""
    trace = answer.traceback.rstrip().splitlines()
    message = f"rank {rank}{where} raised {answer.error_type} in {answer.phase}: {answer.message}{'.' if others else ''}{_others(others)}"
    return ExecutorError(message, rank=rank, phase=answer.phase, kind="raised", error_type=answer.error_type, log_tail=[*tail, *trace])


def lost(node: str, ranks: Sequence[int], why: str, places: str, others: str) -> ExecutorError:
    """A host that is gone. node: "node 1 (its host)". places, others: where its ranks were, and the other ranks are."""
    here = f", {rank_list(ranks)}" if ranks else ""
    last = f" When last heard of: {places}." if places else ""
    return ExecutorError(f"{node.removesuffix(')')}{here}) is lost: {why}.{last}{_others(others)}", phase="node", kind="lost")


def missing(ranks: Sequence[int], hosts: Sequence[str], asked: int, answer: Raised) -> ExecutorError:
    """Ranks of a launcher that are gone or cut off. hosts: where they were, if that is known. asked: the rank that noticed."""
    several = len(ranks) > 1
    at = f" ({', '.join(dict.fromkeys(hosts))})" if hosts else ""
    message = (
        f"{rank_list(ranks)}{at} {'are' if several else 'is'} lost: {'they' if several else 'it'} did not answer when rank {asked} asked "
        f"who is there, after {answer.error_type} in {answer.phase}: {answer.message}"
    )
    rank = None if several else ranks[0]
    return ExecutorError(message, rank=rank, phase=answer.phase, kind="lost", log_tail=answer.traceback.rstrip().splitlines())


def cut_off(rank: int, answer: Raised) -> ExecutorError:
    """A rank of a launcher that reaches nobody, not even the store of all ranks."""
    message = (
        f"rank {rank} is cut off: it cannot reach the store of all ranks any more (or the host that serves it is gone), after "
        f"{answer.error_type} in {answer.phase}: {answer.message}"
    )
    return ExecutorError(message, phase=answer.phase, kind="lost", log_tail=answer.traceback.rstrip().splitlines())


def tells_of_a_lost_peer(answer: Raised) -> bool:
    """Whether an exception may be the echo of another rank's death or absence."""
    text = f"{answer.error_type} {answer.message}".lower()
    return any(word in text for word in _LOSS)


class Watched(Protocol):
    """A rank's process, here or on another host."""

    rank: int

    def state(self) -> str: ...


def health_of(worker: Watched, progress: Progress, stale_s: float) -> RankHealth:
    """A rank as it is now. stale_s: without a sign of life for so long, the kernel is asked whether it is stopped."""
    return RankHealth(
        rank=worker.rank,
        pid=getattr(worker, "pid", 0),
        where=progress.where(),
        phase=phase_of(progress),
        age_s=min(progress.age_s, MOST_AGE_S),
        beat_age_s=min(progress.beat_age_s, MOST_AGE_S),
        stopped=progress.beat_age_s > stale_s and worker.state() == "T",
    )


def laggards(all_progress: Sequence[Progress]) -> list[int]:
    """The ranks that got least far. A rank that finished its step is ahead of one that is inside."""
    order = {phase: i for i, phase in enumerate(("", "spawn", "import", "rendezvous", "init", "load"))}

    def reached(p: Progress) -> tuple[int, int, int, int]:
        early = order.get(p.phase, len(order))
        idle = int(p.phase == "idle")
        return early, p.step, idle, 0 if idle else p.collective

    places = [reached(p) for p in all_progress]
    least = min(places)
    return [rank for rank, place in enumerate(places) if place == least]


def _others(text: str) -> str:
    return f" The others: {text}." if text else ""


def _quote(rank: int, tail: Sequence[str]) -> str:
    """On lines of their own: where only the first line is shown, nothing is announced that does not come."""
    tail = list(tail)
    stack = max((i for i, line in enumerate(tail) if "most recent call first" in line), default=-1)
    shown = tail[stack : stack + 9] if stack >= 0 else tail[-8:]  # of a stack its beginning says where the rank is
    return f"\nLast lines of rank {rank}:\n  " + "\n  ".join(shown) if shown else ""
