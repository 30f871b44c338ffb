"""One server for all tests of a module: the demo model on two ranks."""

from __future__ import annotations

from collections.abc import Iterator

import httpx
import pytest

from lockstep.testing.server import RunningServer, running_server


@pytest.fixture(scope="module")
def server() -> Iterator[RunningServer]:
    with running_server("--max-num-seqs", "32") as found:
        yield found


@pytest.fixture(scope="module")
def http(server: RunningServer) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.url, timeout=60) as client:
        yield client
