"""Python's search for cycles, made rare in a process that serves: it walks everything alive, which stops every stream meanwhile.

With a thousand streams open it took a quarter of an API process's time. Objects of requests are freed by their counts; cycles
are few, and found a little later.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager

THRESHOLDS = (20_000, 10, 10)  # new objects before the young are looked at; and how often that is before older ones are


@contextmanager
def rare_collections() -> Iterator[None]:
    """What is here now is never looked at, what comes later is looked at rarely; as before at the end."""
    before = gc.get_threshold()
    gc.collect()
    gc.freeze()
    gc.set_threshold(*THRESHOLDS)
    try:
        yield
    finally:
        gc.set_threshold(*before)
        gc.unfreeze()
