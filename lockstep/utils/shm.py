"""Memory and bells that processes share through inherited file descriptors: nothing with a name, so nothing can leak.

Why plain Python may talk through shared memory
-----------------------------------------------
*Whole numbers.* A number that another process reads lives in an aligned 8-byte cell, written through a memoryview cast
to native `q`. CPython copies such an item with one 8-byte `memcpy`, which compilers turn into one store; aligned 8-byte
stores are atomic on x86-64 and AArch64. (`struct.pack_into("<q")` would write byte by byte.)
*Order.* Data is written first, its number last, with `fence()` between. x86-64 keeps stores in order and loads in
order; AArch64 does not, and neither orders a store against a later load. Taking and giving back a lock executes an
atomic read-modify-write, a full barrier on x86-64; two rounds order everything on AArch64, because an acquire never
passes an earlier release.
*Caches.* Processes on one host see one coherent memory; `MAP_SHARED` pages of one file are the same physical pages.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import select
import tempfile
import threading

_fence_lock = threading.Lock()


def fence() -> None:
    """Order all earlier memory accesses before all later ones, as other processes see them."""
    with _fence_lock:
        pass
    with _fence_lock:
        pass


class SharedBytes:
    """`size` bytes that this process shares with those that inherit `fd`. Freed by the kernel with the last user."""

    def __init__(self, fd: int, size: int) -> None:
        self.fd, self.size = fd, size
        self.buffer = mmap.mmap(fd, size)

    @classmethod
    def create(cls, size: int) -> SharedBytes:
        """New zeroed memory. Where the system has no memfd, an unlinked temporary file."""
        if hasattr(os, "memfd_create"):
            fd = os.memfd_create("lockstep", os.MFD_CLOEXEC)
        else:
            with tempfile.TemporaryFile() as file:
                fd = os.dup(file.fileno())
        os.ftruncate(fd, size)
        return cls(fd, size)

    def close(self) -> None:
        """Unmap and close. Views into `buffer` must have been released. May be called twice."""
        if self.fd >= 0:
            self.buffer.close()
            os.close(self.fd)
            self.fd = -1


class Bell:
    """Wakes one sleeping process: `ring` from any process, `wait` in one. A ring before the wait is not lost."""

    def __init__(self, fds: tuple[int, int]) -> None:
        """`fds`: (read end, write end), the same number twice for an eventfd."""
        self.fds = fds
        self._lock = threading.Lock()  # a ring that comes while another thread closes must not write to a number used anew
        self._poll = select.poll()
        self._poll.register(fds[0], select.POLLIN)

    @classmethod
    def create(cls) -> Bell:
        if hasattr(os, "eventfd"):
            fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
            return cls((fd, fd))
        read, write = os.pipe()
        os.set_blocking(read, False)
        os.set_blocking(write, False)
        return cls((read, write))

    def ring(self) -> None:
        """Wake the one that waits. Nothing on a closed bell: who would have been woken is gone."""
        with self._lock, contextlib.suppress(BlockingIOError):  # full: it rings already
            if self.fds[1] >= 0:
                os.write(self.fds[1], b"\1\0\0\0\0\0\0\0")

    def wait(self, timeout_s: float) -> bool:
        """Sleep until rung, at most `timeout_s` (rounded up to milliseconds). True when it was rung."""
        if not self._poll.poll(max(0, -int(-timeout_s * 1000 // 1))):
            return False
        with contextlib.suppress(BlockingIOError):
            os.read(self.fds[0], 4096)
        return True

    def close(self) -> None:
        with self._lock:
            for fd in set(self.fds):
                if fd >= 0:
                    os.close(fd)
            self.fds = (-1, -1)
