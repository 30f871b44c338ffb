"""How long a thread of Python keeps the interpreter while another one asks for it, made short in a process that serves.

The event loop gives the interpreter up at each read and write, and waits this long to have it back while a long body is parsed
beside it: a small request gives it up ten times. With Python's 5 ms, small requests beside bodies of 16 MB took 15 to 49 ms
where they now take 5 to 13 (`benchmarks/malformed_bodies.py`).
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

SWITCH_S = 0.0005


@contextmanager
def short_switches() -> Iterator[None]:
    """As before at the end."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(SWITCH_S)
    try:
        yield
    finally:
        sys.setswitchinterval(before)
