"""What each rank is doing, readable by everyone at any moment: so that every wait can say who, what and since when.

One cell per rank in shared memory. A rank writes only its own cell, anyone reads, nobody locks. A rank that is killed,
stopped or stuck leaves its last words behind. No torch.

Cell (1152 bytes), every number an aligned 8-byte integer (see `utils.shm` for why that is enough):

    0 version   odd while phase, step or note are being changed; a reader that sees it odd or changed reads again
    1 step      of the plan being executed, -1 when none
    2 collective  collectives entered in this step
    3 changed   monotonic ns of the last change of anything above
    4 beat      monotonic ns of the last sign of life (its own thread: it goes on while the main thread is stuck)
    5 what      which of the names below the last collective was, plus one; 0 when unknown
    6-7         free
    64..96      phase, UTF-8, zero-padded
    96..256     note
    256..768    16 names of collectives, written once each, so that naming one costs a single store
    768..1152   what its time went into, see `rank_times`
"""

from __future__ import annotations

import time
from collections.abc import Iterable

import msgspec

from lockstep.distributed import rank_times
from lockstep.distributed.rank_times import RankTimes
from lockstep.protocol.live import RankLive
from lockstep.utils.shm import SharedBytes, fence

_CELL = 1152
_PHASE = slice(64, 96)
_NOTE = slice(96, 256)
_NAMES, _NAME_BYTES, _TIMES = 256, 32, 768
_VERSION, _STEP, _COLLECTIVE, _CHANGED, _BEAT, _WHAT = range(6)


class Progress(msgspec.Struct, frozen=True):
    """One rank at one moment. Ages are seconds; `inf` when it never happened. The monotonic clock is the host's."""

    phase: str
    step: int
    collective: int
    age_s: float  # since phase, step, collective or note changed
    beat_age_s: float  # since the rank's last sign of life
    note: str
    what: str = ""  # the last collective entered, like "tp:0.all_reduce"

    def where(self) -> str:
        """What the rank is doing, in words: "step 913 collective 14", "idle after step 913", "load (61 %)"."""
        text = self.phase or "not started"
        if self.phase == "step":
            text = f"step {self.step} collective {self.collective}"
        elif self.phase == "idle" and self.step >= 0:
            text = f"idle after step {self.step}"
        if self.what and self.collective:
            text += f" ({self.what})"
        return f"{text} ({self.note})" if self.note else text

    def __str__(self) -> str:
        return f"{self.where()}, for {self.age_s:.1f} s" if self.age_s < float("inf") else self.where()


class BoardHandle(msgspec.Struct, frozen=True):
    """What a child process needs to attach: the inherited descriptor and the number of ranks."""

    fd: int
    n_ranks: int


class ProgressCell:
    """One rank's cell. Only its rank sets it, from one thread; `beat` may come from another."""

    def __init__(self, view: memoryview) -> None:
        """`view`: the cell's bytes."""
        self._bytes = view
        self._numbers = view[:64].cast("q")
        self.times = RankTimes(view[_TIMES:])
        self._names: dict[str, int] = {}

    def set(self, phase: str | None = None, step: int | None = None, collective: int | None = None, note: str | None = "") -> None:
        """Change what is given. A new phase begins at collective 0; the note is cleared unless given (None keeps it)."""
        numbers = self._numbers
        numbers[_VERSION] += 1
        fence()
        if phase is not None:
            self._text(_PHASE, phase)
            if collective is None:
                numbers[_COLLECTIVE] = 0
        if step is not None:
            numbers[_STEP] = step
        if collective is not None:
            numbers[_COLLECTIVE] = collective
        if note is not None:
            self._text(_NOTE, note)
        numbers[_CHANGED] = numbers[_BEAT] = time.monotonic_ns()
        fence()
        numbers[_VERSION] += 1

    def enter_collective(self, what: str = "") -> None:
        """Count one more collective of this phase and say which. Cheap (three stores): it is called for each."""
        numbers = self._numbers
        numbers[_WHAT] = self.number_of(what)
        numbers[_COLLECTIVE] += 1
        numbers[_CHANGED] = time.monotonic_ns()

    def number_of(self, what: str) -> int:
        """A collective's number in this cell, from 1 on; 0 when there is no room for its name."""
        return self._names.get(what) or self._name(what)

    def _name(self, what: str) -> int:
        number = len(self._names) + 1
        if not what or number > rank_times.NAMES:
            return 0
        start = _NAMES + (number - 1) * _NAME_BYTES
        self._text(slice(start, start + _NAME_BYTES), what)
        fence()
        self._names[what] = number
        return number

    def beat(self) -> None:
        """Give a sign of life."""
        self._numbers[_BEAT] = time.monotonic_ns()

    def name_at(self, number: int) -> str:
        """The collective of that number; "" when there is none."""
        start = _NAMES + (number - 1) * _NAME_BYTES
        return _string(bytes(self._bytes[start : start + _NAME_BYTES])) if number > 0 else ""

    def _text(self, where: slice, text: str) -> None:
        width = where.stop - where.start
        raw = text.encode("utf-8", "replace")[:width]
        self._bytes[where] = raw + b"\0" * (width - len(raw))

    def release(self) -> None:
        """Let go of the memory; the cell is dead afterwards."""
        self._numbers.release()
        self.times.release()
        self._bytes.release()


class ProgressBoard:
    """The cells of all ranks."""

    def __init__(self, memory: SharedBytes, n_ranks: int) -> None:
        self._memory, self.n_ranks = memory, n_ranks
        self._view = memoryview(memory.buffer)
        self._cells = [ProgressCell(self._view[r * _CELL : (r + 1) * _CELL]) for r in range(n_ranks)]

    @classmethod
    def create(cls, n_ranks: int) -> ProgressBoard:
        board = cls(SharedBytes.create(n_ranks * _CELL), n_ranks)
        for cell in board._cells:
            cell._numbers[_STEP] = -1
        return board

    @classmethod
    def attach(cls, handle: BoardHandle) -> ProgressBoard:
        return cls(SharedBytes(handle.fd, handle.n_ranks * _CELL), handle.n_ranks)

    @property
    def handle(self) -> BoardHandle:
        """To give to a child, which must inherit `handle.fd`."""
        return BoardHandle(self._memory.fd, self.n_ranks)

    def cell(self, rank: int) -> ProgressCell:
        return self._cells[rank]

    def read(self, rank: int) -> Progress:
        """The rank's cell now. A cell whose writer stopped half-way is read as it is, after some 10 ms."""
        cell = self._cells[rank]
        for attempt in range(25):
            if attempt > 4:
                time.sleep(0.0005)  # the writer lost its core, or the interpreter, in the middle
            version = cell._numbers[_VERSION]
            fence()
            numbers = list(cell._numbers[:6])
            phase, note = bytes(cell._bytes[_PHASE]), bytes(cell._bytes[_NOTE])
            fence()
            if version % 2 == 0 and cell._numbers[_VERSION] == version:
                break
        now = time.monotonic_ns()
        age, beat_age = ((now - t) * 1e-9 if t else float("inf") for t in (numbers[_CHANGED], numbers[_BEAT]))
        what = cell.name_at(numbers[_WHAT])
        return Progress(_string(phase), numbers[_STEP], numbers[_COLLECTIVE], max(age, 0.0), max(beat_age, 0.0), _string(note), what)

    def live(self, rank: int) -> RankLive:
        """What the rank is doing, and what its time went into so far. No message, no lock: the rank is not disturbed."""
        progress, cell = self.read(rank), self._cells[rank]
        return cell.times.live(
            rank,
            phase=progress.where(),
            beat_age_s=None if progress.beat_age_s == float("inf") else progress.beat_age_s,
            names=[cell.name_at(number) for number in range(1, rank_times.NAMES + 1)],
        )

    def copy_out(self, rank: int) -> bytes:
        """The rank's cell as it is now, for `copy_in` on another host."""
        self.read(rank)  # waits a moment for a writer that is in the middle of a change
        return bytes(self._cells[rank]._bytes)

    def copy_in(self, rank: int, cell: bytes, now_ns: int) -> None:
        """Show a rank that lives on another host: its cell, and that host's monotonic clock when it was copied out.

        Only for cells that nobody else writes. Raises ValueError for what is no cell.
        """
        if len(cell) != _CELL:
            raise ValueError(f"a progress cell of {len(cell)} bytes")
        own, shift = self._cells[rank], time.monotonic_ns() - now_ns
        own._bytes[:] = cell
        for at in (_CHANGED, _BEAT):
            if own._numbers[at]:
                own._numbers[at] += shift
        own._numbers[_VERSION] &= ~1

    def all(self) -> list[Progress]:
        """Every rank's cell, by rank."""
        return [self.read(rank) for rank in range(self.n_ranks)]

    def describe(self, ranks: Iterable[int] | None = None) -> str:
        """The ranks (default all) in one line; ranks that are doing the same are named together."""
        places: dict[str, list[int]] = {}
        oldest: dict[str, float] = {}
        for rank in range(self.n_ranks) if ranks is None else ranks:
            progress = self.read(rank)
            where = progress.where()
            places.setdefault(where, []).append(rank)
            oldest[where] = max(oldest.get(where, 0.0), progress.age_s)
        return "; ".join(f"{rank_list(r)} at {where}{_since(oldest[where])}" for where, r in places.items())

    def close(self) -> None:
        """Unmap. May be called twice; cells are dead afterwards."""
        for cell in self._cells:
            cell.release()
        self._cells = []
        self._view.release()
        self._memory.close()


def rank_list(ranks: Iterable[int]) -> str:
    """ "rank 1", "ranks 0, 2"."""
    names = [str(r) for r in ranks]
    return ("rank " if len(names) == 1 else "ranks ") + ", ".join(names)


def _since(age_s: float) -> str:
    return f" for {age_s:.1f} s" if age_s < float("inf") else ""


def _string(raw: bytes) -> str:
    return raw.rstrip(b"\0").decode("utf-8", "replace")
