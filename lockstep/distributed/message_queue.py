"""One writer, many readers, one host: messages through a ring of chunks in shared memory. No torch.

It carries each step's plan from the engine to all workers: one copy in, one copy out per reader, no socket.

How it works
1. Chunk i of the stream lives at place i % chunks. `written` counts the chunks the writer has published, `read[r]`
   those reader r is done with. The writer may fill a place while `written - min(read) < chunks`: a slow reader holds it
   back, nothing is ever dropped or overwritten.
2. Data first, then its descriptor (length and flags), then `written`; readers copy, then advance `read` (order: see
   `utils.shm`). Each number has one writer, so there is no lock that a dying process could hold.
3. A message larger than a chunk spans several; the first and the last are flagged. A reader that meets a "first" in
   the middle of a message drops the beginning it has: the writer gave that message up (timeout).
4. Waiting is a short spin that yields the core, then sleep on a bell (eventfd) that the other side rings. The sleep is
   sliced, and between slices the other side is checked for being alive.

Cells (8 bytes; a cache line of eight for each owner):
    line 0    written, closed, waits, pid and birth of the writer
    line 1+r  read, closed, -, pid and birth of reader r
    then one descriptor per place: length << 2 | last << 1 | first
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable

import msgspec

from lockstep.utils import procs
from lockstep.utils.shm import Bell, SharedBytes, fence

_LINE = 8  # cells
_COUNT, _CLOSED, _WAITS, _PID, _BIRTH = range(5)
_FIRST, _LAST = 1, 2
SPIN_S = 30e-6
SLICE_S = 0.2  # longest sleep between two looks at whether the other side lives


class QueueClosed(RuntimeError):
    """The other side closed the queue or is dead, or this side was closed while waiting. The message says which."""


class QueueHandle(msgspec.Struct, frozen=True):
    """What one reader's process needs to attach. It must inherit the descriptors in `fds`."""

    memory_fd: int
    n_readers: int
    chunk_bytes: int
    chunks: int
    reader: int
    reader_bell: tuple[int, int]
    writer_bell: tuple[int, int]

    @property
    def fds(self) -> tuple[int, ...]:
        return tuple({self.memory_fd, *self.reader_bell, *self.writer_bell})

    def duplicate(self) -> QueueHandle:
        """The same with descriptors of its own, for a reader in the writer's process: attaching takes them over."""
        copies = {fd: os.dup(fd) for fd in self.fds}
        bells = [(copies[read], copies[write]) for read, write in (self.reader_bell, self.writer_bell)]
        return QueueHandle(copies[self.memory_fd], self.n_readers, self.chunk_bytes, self.chunks, self.reader, bells[0], bells[1])


class _Ring:
    """The memory both sides see, and what closing has in common."""

    def __init__(self, memory: SharedBytes, n_readers: int, chunk_bytes: int, chunks: int) -> None:
        self.n_readers, self.chunk_bytes, self.chunks = n_readers, chunk_bytes, chunks
        self._memory = memory
        self._view = memoryview(memory.buffer)
        self._data_start = _data_start(n_readers, chunks)
        self._cells = self._view[: self._data_start].cast("q")
        self._descriptors = (1 + n_readers) * _LINE
        self._busy = threading.Lock()  # held by a call in progress, so that close() does not unmap under it
        self._shut = False
        self._own = 0  # first cell of this side's line

    def _sign_in(self) -> None:
        pid = os.getpid()
        self._cells[self._own + _BIRTH] = procs.birth(pid)
        self._cells[self._own + _PID] = pid

    def _gone(self, line: int) -> str:
        """Why the side that owns `line` can take no more part; "" when it can (or has not come yet)."""
        pid = self._cells[line + _PID]
        if self._cells[line + _CLOSED]:
            return f"pid {pid} closed it"
        if pid and not procs.alive(pid, self._cells[line + _BIRTH]):
            return f"pid {pid} died"
        return ""

    def _place(self, i: int) -> int:
        return self._data_start + (i % self.chunks) * self.chunk_bytes

    def _close(self, own_bells: list[Bell], other_bells: list[Bell]) -> None:
        if self._shut:
            return
        self._cells[self._own + _CLOSED] = 1
        self._shut = True
        fence()
        for bell in own_bells + other_bells:
            bell.ring()
        if self._busy.acquire(timeout=1.0):  # else leave it mapped: a thread is still inside
            self._cells.release()
            self._view.release()
            self._memory.close()
            for bell in own_bells + other_bells:
                bell.close()
            self._busy.release()


class MessageQueue(_Ring):
    """The writer's side. `MessageQueue.create`, hand `handle(r)` to reader r, `enqueue`; `MessageQueue.attach` there."""

    def __init__(self, memory: SharedBytes, chunk_bytes: int, chunks: int, bell: Bell, reader_bells: list[Bell]) -> None:
        super().__init__(memory, len(reader_bells), chunk_bytes, chunks)
        self._bell, self._reader_bells = bell, reader_bells
        self._written = 0
        self._slowest = 0  # a lower bound of min(read): looked up again only when the ring seems full
        self._sign_in()

    @classmethod
    def create(cls, n_readers: int, chunk_bytes: int = 1 << 16, chunks: int = 32) -> MessageQueue:
        """A new queue; this process is its writer. Only pages that are used take memory."""
        if n_readers < 1 or chunk_bytes < 1 or chunks < 1:
            raise ValueError(f"n_readers={n_readers}, chunk_bytes={chunk_bytes}, chunks={chunks}: each must be at least 1.")
        memory = SharedBytes.create(_data_start(n_readers, chunks) + chunk_bytes * chunks)
        return cls(memory, chunk_bytes, chunks, Bell.create(), [Bell.create() for _ in range(n_readers)])

    @staticmethod
    def prepare(chunk_bytes: int = 1 << 16, chunks: int = 32) -> QueueHandle:
        """A new queue for one reader whose writer is another process: attach here, `adopt` the same handle there."""
        memory, bell, reader_bell = SharedBytes.create(_data_start(1, chunks) + chunk_bytes * chunks), Bell.create(), Bell.create()
        memory.buffer.close()  # who attaches maps it again
        return QueueHandle(memory.fd, 1, chunk_bytes, chunks, 0, reader_bell.fds, bell.fds)

    @classmethod
    def adopt(cls, handle: QueueHandle) -> MessageQueue:
        """The writer's side of a prepared queue, in the process that inherited `handle.fds`."""
        memory = SharedBytes(handle.memory_fd, _data_start(1, handle.chunks) + handle.chunk_bytes * handle.chunks)
        return cls(memory, handle.chunk_bytes, handle.chunks, Bell(handle.writer_bell), [Bell(handle.reader_bell)])

    @staticmethod
    def attach(handle: QueueHandle) -> MessageReader:
        """The reader's side, in the process that inherited `handle.fds`."""
        return MessageReader(handle)

    def handle(self, reader: int) -> QueueHandle:
        """What reader `reader` (0 to n_readers - 1) attaches with. Each handle serves one reader."""
        bell = self._reader_bells[reader]
        return QueueHandle(self._memory.fd, self.n_readers, self.chunk_bytes, self.chunks, reader, bell.fds, self._bell.fds)

    def enqueue(self, message: bytes, timeout: float | None = None) -> None:
        """Give `message` to every reader. Waits while the ring is full.

        Raises TimeoutError after `timeout` s (no reader will see any of the message), naming the readers that are
        behind; QueueClosed when a reader it waits for is gone, or close() was called.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        with self._busy:
            size, start, flags = len(message), 0, _FIRST
            while True:
                self._wait_for_place(deadline)
                stop = min(start + self.chunk_bytes, size)
                if stop == size:
                    flags |= _LAST
                at = self._place(self._written)
                self._view[at : at + stop - start] = message if stop - start == size else message[start:stop]
                self._cells[self._descriptors + self._written % self.chunks] = (stop - start) << 2 | flags
                fence()
                self._written += 1
                self._cells[_COUNT] = self._written
                start, flags = stop, 0
                if stop == size:
                    break
            for bell in self._reader_bells:
                bell.ring()

    def lag(self) -> list[int]:
        """Chunks that each reader has not taken yet, by reader."""
        return [self._written - self._cells[self._line(r) + _COUNT] for r in range(self.n_readers)]

    def close(self) -> None:
        """Wake everyone: readers take what is left, then get QueueClosed. May be called twice, from any thread."""
        self._close([self._bell], self._reader_bells)

    def _line(self, reader: int) -> int:
        return (1 + reader) * _LINE

    def _full(self) -> bool:
        if self._written - self._slowest < self.chunks:
            return False
        self._slowest = self._written - max(self.lag())
        return self._written - self._slowest >= self.chunks

    def _wait_for_place(self, deadline: float | None) -> None:
        if not self._shut and self._full():
            for bell in self._reader_bells:  # part of a long message may be all that they wait for
                bell.ring()
            since = time.monotonic()
            try:
                while not self._shut and self._full():
                    self._sleep(since, deadline)
            finally:
                self._cells[_WAITS] = 0
        if self._shut:
            raise QueueClosed("the message queue was closed by its writer.")

    def _sleep(self, since: float, deadline: float | None) -> None:
        """Wait a little for a place. Raises TimeoutError, QueueClosed as `enqueue` does."""
        now = time.monotonic()
        if now - since < SPIN_S:
            os.sched_yield()
            return
        self._cells[_WAITS] = 1
        fence()
        if not self._full():
            return
        if deadline is not None and now >= deadline:
            raise TimeoutError(f"the message queue was full for {now - since:.1f} s: {self._behind()}.")
        if not self._bell.wait(SLICE_S if deadline is None else min(SLICE_S, deadline - now)):
            self._check_readers()

    def _check_readers(self) -> None:
        for reader in range(self.n_readers):
            why = self._gone(self._line(reader))
            if why:
                raise QueueClosed(f"reader {reader} of the message queue is gone: {why}.")

    def _behind(self) -> str:
        """The readers that hold the writer up, in words."""
        lag = self.lag()
        late = [r for r in range(self.n_readers) if lag[r] >= self.chunks]
        parts = []
        for r in late:
            pid = self._cells[self._line(r) + _PID]
            parts.append(f"reader {r} (pid {pid}) is {lag[r]} chunks behind" if pid else f"reader {r} has never attached")
        return f"{len(late)} of {self.n_readers} readers are behind: {', '.join(parts)}"


class MessageReader(_Ring):
    """One reader's side."""

    def __init__(self, handle: QueueHandle) -> None:
        size = _data_start(handle.n_readers, handle.chunks) + handle.chunk_bytes * handle.chunks
        super().__init__(SharedBytes(handle.memory_fd, size), handle.n_readers, handle.chunk_bytes, handle.chunks)
        self._own = (1 + handle.reader) * _LINE
        self._bell, self._writer_bell = Bell(handle.reader_bell), Bell(handle.writer_bell)
        self._read = self._cells[self._own + _COUNT]
        self._parts: list[bytes] | None = None
        self._sign_in()

    def dequeue(self, timeout: float | None = None) -> bytes:
        """The next message, a copy. Waits for it without burning a core.

        Raises TimeoutError after `timeout` s, QueueClosed when the writer is gone and everything is read, or when
        close() is called meanwhile.
        """
        message = self._receive(timeout, _never)
        assert message is not None
        return message

    def poll(self, timeout: float | None = None, unless: Callable[[], bool] | None = None) -> bytes | None:
        """As `dequeue`, but None when nothing came in time (0: at once), or when `unless()` is true, which `wake` makes it look at."""
        if timeout == 0 and not self._shut and self._cells[_COUNT] <= self._read:
            return None
        try:
            return self._receive(timeout, unless or _never)
        except TimeoutError:
            return None

    def wake(self) -> None:
        """Let who waits in `poll` look at its `unless`."""
        self._bell.ring()

    def _receive(self, timeout: float | None, unless: Callable[[], bool]) -> bytes | None:
        deadline = None if timeout is None else time.monotonic() + timeout
        with self._busy:
            while self._wait_for_chunk(deadline, unless):
                message = self._take()
                if message is not None:
                    return message
        return None

    def close(self) -> None:
        """Stop reading for good and wake the writer. May be called twice, from any thread."""
        self._close([self._bell], [self._writer_bell])

    def _take(self) -> bytes | None:
        """Copy the next chunk out; the whole message when it was the last one."""
        fence()
        descriptor = self._cells[self._descriptors + self._read % self.chunks]
        at = self._place(self._read)
        chunk = bytes(self._view[at : at + (descriptor >> 2)])
        fence()
        self._read += 1
        self._cells[self._own + _COUNT] = self._read
        fence()
        if self._cells[_WAITS]:
            self._writer_bell.ring()
        if descriptor & _FIRST:
            self._parts = []
        elif self._parts is None:
            return None
        self._parts.append(chunk)
        if not descriptor & _LAST:
            return None
        parts, self._parts = self._parts, None
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def _wait_for_chunk(self, deadline: float | None, unless: Callable[[], bool]) -> bool:
        """Whether there is one; False when `unless()` says so first."""
        since = 0.0
        while not self._shut and self._cells[_COUNT] <= self._read:
            if unless():
                return False
            now = time.monotonic()
            since = since or now
            if now - since < SPIN_S:
                os.sched_yield()
                continue
            if deadline is not None and now >= deadline:
                raise TimeoutError(f"no message from pid {self._cells[_PID]} for {now - since:.1f} s.")
            rung = self._bell.wait(SLICE_S if deadline is None else min(SLICE_S, deadline - now))
            why = "" if rung and not self._cells[_CLOSED] else self._gone(0)
            if why and self._cells[_COUNT] <= self._read:
                raise QueueClosed(f"the writer of the message queue is gone: {why}.")
        if self._shut:
            raise QueueClosed("the message queue was closed by this reader.")
        return True


def _never() -> bool:
    return False


def _data_start(n_readers: int, chunks: int) -> int:
    """Bytes before the first chunk: all cells, rounded up to a page."""
    cells = (1 + n_readers) * _LINE + chunks
    return -(-cells * 8 // 4096) * 4096
