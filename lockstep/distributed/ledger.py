"""The collective ledger (`--check-collectives`): ranks compare what they are about to do before they do it.

Without it, ranks that disagree hang until a timeout, or worse, add up tensors that do not belong together. With it:

1. Before each collective a rank writes its record for this group: the collective's number in the group, a digest of all
   it did in the group so far, the operation, shapes, dtypes, and the line of code that asked.
2. It waits until every other member has written its record of that number, and compares digests. Different: an error
   that names both ranks, operations and call sites.
3. While it waits, it looks at what the late member does. A member that waits for *this* rank in another group's
   collective will never come: an error at once. So is a member that died or left. Else it is late: an error, with the last
   thing it did, after the ledger's timeout.
4. Whoever finds an error puts it on the board, and every rank raises it at its next look.

Off, the cost is one truth test per collective.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import sys
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from lockstep.distributed.ledger_boards import Board, Record, SharedMemoryBoard, StoreBoard

if TYPE_CHECKING:
    from torch import Tensor

# Read on every collective: empty when the ledger is off.
active: list[Ledger] = []

_HERE = os.path.dirname(os.path.abspath(__file__)) + os.sep
_FOREIGN = (f"{os.sep}torch{os.sep}", f"{os.sep}contextlib.py", "<")


class CollectiveMismatchError(RuntimeError):
    """Ranks of one group entered different collectives. The message names both ranks, operations and call sites."""


class CollectiveTimeoutError(CollectiveMismatchError):
    """A member of the group did not come to a collective. The message names it and the last thing it did."""


class _Page:
    """This rank's account of one group."""

    def __init__(self, group: str, ranks: Sequence[int]) -> None:
        self.group, self.ranks = group, tuple(ranks)
        self.key = f"{group}[{','.join(map(str, ranks))}]"
        self.number = 0
        self.digest = ""

    def turn(self, what: str) -> None:
        self.number += 1
        self.digest = hashlib.blake2b(f"{self.digest}|{what}".encode(), digest_size=8).hexdigest()


class Ledger:
    """One rank's end of the comparison."""

    def __init__(self, board: Board, rank: int, timeout_s: float) -> None:
        self.board, self.rank, self.timeout_s = board, rank, timeout_s
        self._pages: dict[str, _Page] = {}

    def _page(self, group: str, ranks: Sequence[int]) -> _Page:
        page = self._pages.get(group)
        if page is None:
            page = self._pages[group] = _Page(group, ranks)
        return page

    def enter(self, group: str, ranks: Sequence[int], rank: int, op: str, tensors: Sequence[Tensor], detail: str) -> None:
        """Return when all `ranks` have entered this same collective. Raises CollectiveMismatchError (or its Timeout kind)."""
        page, what = self._page(group, ranks), _describe(op, tensors, detail)
        page.turn(what)
        record = Record(page.key, page.digest, what, _call_site(), page.ranks)
        self.board.publish(page.key, page.number, record, waiting=True)
        started = time.monotonic()
        for peer in page.ranks:
            if peer != self.rank:
                self._compare(page, peer, record, started)
        # A late rank finds all records in place, but the others have given up on it.
        self._look()
        self.board.proceed()

    def note(self, group: str, rank: int, op: str, tensors: Sequence[Tensor], detail: str) -> None:
        """Record what only two ranks take part in: named as a rank's last act, not compared."""
        self._look()
        page = self._page(f"{group}.p2p", (self.rank,))
        page.number += 1
        record = Record(page.key, "", _describe(op, tensors, detail), _call_site(), (self.rank,))
        self.board.publish(page.key, page.number, record, waiting=False)

    def wait_for(self, done: Callable[[], bool]) -> None:
        """Wait until `done`, raising when another rank found an error: its sender may never send."""
        pause = _Pause()
        while not done():
            self._look()
            pause()

    def _compare(self, page: _Page, peer: int, mine: Record, started: float) -> None:
        pause = _Pause()
        while True:
            theirs = self.board.read(peer, page.key, page.number)
            if theirs is not None:
                if theirs.digest != mine.digest:
                    self._fail(CollectiveMismatchError, self._differ(page, peer, mine, theirs))
                return
            self._look()
            elsewhere = self._elsewhere(page, peer)
            gone = self.board.gone(peer)
            if self.board.read(peer, page.key, page.number) is not None:
                continue  # it came between the two looks
            if elsewhere:
                self._fail(
                    CollectiveMismatchError, self._entered(page, mine) + f", but rank {peer} waits for rank {self.rank} in {elsewhere}."
                )
            waited_s = time.monotonic() - started
            if gone or waited_s > self.timeout_s:
                why = gone or f"it did not come in {waited_s:.1f} s"
                self._fail(
                    CollectiveTimeoutError, self._entered(page, mine) + f", but rank {peer} is missing: {why}; {self._last_act(peer)}."
                )
            pause()

    def _elsewhere(self, page: _Page, peer: int) -> str:
        """The collective in which `peer` waits for this rank while this rank waits for it; empty when there is none."""
        last = self.board.last(peer)
        if last is None or not last[2]:
            return ""
        number, record, _ = last
        if record.key == page.key or self.rank not in record.ranks:
            return ""
        mine = next((p.number for p in self._pages.values() if p.key == record.key), 0)
        return f"collective {number} of group {record.key}: {_act(record)}" if mine < number else ""

    def _last_act(self, peer: int) -> str:
        last = self.board.last(peer)
        return "it has entered nothing yet" if last is None else f"the last thing it entered was {_act(last[1])}"

    def _entered(self, page: _Page, mine: Record) -> str:
        return f"collective {page.number} of group {page.group} {list(page.ranks)}: rank {self.rank} entered {_act(mine)}"

    def _differ(self, page: _Page, peer: int, mine: Record, theirs: Record) -> str:
        same = " (alike now, but an earlier one differed)" if mine.what == theirs.what else ""
        return f"{self._entered(page, mine)}, but rank {peer} entered {_act(theirs)}{same}."

    def _look(self) -> None:
        verdict = self.board.verdict()
        if verdict:
            kind, _, text = verdict.partition(":")
            raise (CollectiveTimeoutError if kind == CollectiveTimeoutError.__name__ else CollectiveMismatchError)(text)

    def _fail(self, kind: type[CollectiveMismatchError], text: str) -> None:
        self.board.accuse(f"{kind.__name__}:{text}")
        raise kind(text)

    def close(self) -> None:
        """Leave: others that still wait for this rank are told."""
        self.board.close()


class _Pause:
    """Yields at first, then sleeps up to a millisecond."""

    def __init__(self) -> None:
        self._turns = 0

    def __call__(self) -> None:
        self._turns += 1
        time.sleep(0 if self._turns < 50 else min(1e-3, 2e-5 * (self._turns - 49)))


def _act(record: Record) -> str:
    return f"{record.what} at {record.site}"


def _describe(op: str, tensors: Sequence[Tensor], detail: str) -> str:
    parts = [f"{str(x.dtype).removeprefix('torch.')} {list(x.shape)}" for x in tensors]
    return f"{op}({', '.join(parts + ([detail] if detail else []))})"


def _call_site() -> str:
    """The nearest line outside this package: the layer, worker or test that asked."""
    frame: Any = sys._getframe(2)
    while frame is not None:
        name = frame.f_code.co_filename
        if not name.startswith(_HERE) and not any(part in name for part in _FOREIGN):
            return f"{name}:{frame.f_lineno} ({frame.f_code.co_name})"
        frame = frame.f_back
    return "unknown"


def enable(timeout_s: float = 30.0, force_store: bool = False) -> None:
    """Compare from here on. Collective over the world; call it right after the groups are made.

    timeout_s: how late a rank may be. force_store: use the store, as for several hosts, on one too.
    """
    from lockstep.distributed import objects, parallel_state

    world = parallel_state.get_world_group()
    disable()
    if world.world_size == 1:
        return
    if force_store or parallel_state.get_node_count() > 1 or not os.path.isdir("/dev/shm"):
        board: Any = StoreBoard(parallel_state.shared_store("ledger"), world.rank)
        world.cpu_communicator.barrier()
    else:
        path, fd = SharedMemoryBoard.create_file(world.world_size) if world.rank_in_group == 0 else ("", -1)
        try:
            path = objects.broadcast(world.cpu_communicator, path, 0)
            fd = fd if fd >= 0 else os.open(path, os.O_RDWR)
            board = SharedMemoryBoard.attach(fd, world.rank, world.world_size)
            world.cpu_communicator.barrier()
        finally:
            if world.rank_in_group == 0 and path:
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(path)
        board.ready()
    active.append(Ledger(board, world.rank, timeout_s))


def disable() -> None:
    """Stop comparing. Not collective; others that wait for this rank get an error that says so."""
    while active:
        active.pop().close()
