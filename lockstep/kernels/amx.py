"""The kernel's permission to use AMX tiles. Linux makes every process ask (arch_prctl(2), ARCH_REQ_XCOMP_PERM).

Without it, the first tile instruction ends the process with SIGILL. Threads and forked children inherit it.
"""

from __future__ import annotations

import ctypes
import os
import platform
import sys
from functools import lru_cache

_SYS_ARCH_PRCTL = 158  # x86-64
_ARCH_REQ_XCOMP_PERM = 0x1023
_XFEATURE_XTILEDATA = 18


@lru_cache(maxsize=1)
def refusal() -> str:
    """Ask once for this process; why it may not use AMX tiles, "" when it may."""
    if sys.platform != "linux" or platform.machine() != "x86_64":
        return "only Linux on x86-64 has it"
    return _ask()


def _ask() -> str:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.syscall(_SYS_ARCH_PRCTL, _ARCH_REQ_XCOMP_PERM, _XFEATURE_XTILEDATA) == 0:
        return ""
    return f"the system refuses AMX tiles to this process ({os.strerror(ctypes.get_errno())})"
