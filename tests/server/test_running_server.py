"""The server that the other tests here talk to starts, answers, and leaves nothing behind."""

from __future__ import annotations

import httpx
import pytest

from lockstep.testing.executors import children_of
from lockstep.testing.server import running_server
from lockstep.utils import procs


def test_it_answers_and_leaves_nothing() -> None:
    with running_server() as server:
        assert httpx.get(f"{server.url}/health", timeout=30).status_code == 200
        below = children_of(server.pid)
        assert below
        assert server.stop() == 0
    assert not [pid for pid in below if procs.alive(pid)]


def test_one_that_cannot_start_says_why() -> None:
    with pytest.raises(AssertionError, match="no-such-host"), running_server("--host", "no-such-host.invalid"):
        pass
