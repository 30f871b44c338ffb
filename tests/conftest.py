"""What every test shares: no wall-clock limits on hypothesis examples, and GPU tests only where there is a GPU."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
from hypothesis import settings

# Machines that run tests are shared and slow at times: an example is never too slow, only wrong.
settings.register_profile("lockstep", deadline=None)
settings.load_profile("lockstep")
# A library pool of threads per test process, times parallel test processes, is slower than one thread each.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# A shell's background job ignores Ctrl-C, and so does all that it starts; the tests' children are told to stop by it.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """`make test` leaves `cuda` tests out; a plain pytest run on a machine without a GPU says why it does not run them."""
    if not list(Path("/dev").glob("nvidia[0-9]*")):
        for item in items:
            if item.get_closest_marker("cuda"):
                item.add_marker(pytest.mark.skip(reason="no NVIDIA GPU here: scripts/gpu_check.sh runs these where there is one"))
