"""How ranks meet: bound sockets handed on, back-off, and timeouts that say who is missing."""

from __future__ import annotations

import os
import socket
import subprocess
import sys

import pytest

from lockstep.testing.ranks import run_ranks
from lockstep.utils import net
from lockstep.utils.net import Listener

JOBS = "tests.distributed.rendezvous_jobs"


def free_port() -> int:
    """Where a test needs an address before anybody listens; the tests below retry nothing, the kernel hands out ports in turn."""
    with Listener() as listener:
        return listener.port


def test_a_missing_rank_is_named():
    found = run_ranks(f"{JOBS}:absent", 2, free_port(), init=False)
    phase, text, missing, took = found[0]
    assert phase == "connected" and missing == [2]
    assert "1 of 3 ranks" in text and "missing: rank 2 (never connected)" in text
    assert 0.9 < took < 10
    # Rank 0 serves the store and may be gone when rank 1 asks who is missing.
    assert found[1][0] == "connected" and ("rank 2" in found[1][1] or "is gone" in found[1][1])


def test_a_late_rank_is_named_with_what_it_does():
    phase, text, missing, _ = run_ranks(f"{JOBS}:lingering", 2)[0]
    assert phase == "second" and missing == [1]
    assert "rank 1 (last in 'loading 61 %'" in text and "s ago, pid" in text


def test_nobody_serves():
    phase, text, missing, took = run_ranks(f"{JOBS}:nobody_serves", 1, free_port(), init=False)[0]
    assert phase == "connect" and missing == [0]
    assert "rank 1 could not reach the rendezvous at 127.0.0.1" in text and "Connection refused" in text
    assert 0.5 < took < 5


def test_a_late_server_is_waited_for():
    assert all(1.0 <= took < 20 for took in run_ranks(f"{JOBS}:late_server", 2, free_port(), init=False))


def test_the_store_owns_the_socket_it_is_given():
    assert run_ranks(f"{JOBS}:store_fd", 1, init=False) == [True]


def test_a_listener_holds_its_port_and_hands_it_on():
    """Eight at once get eight ports; a child serves on the inherited socket while the parent forgets it."""
    listeners = [Listener() for _ in range(8)]
    assert len({listener.port for listener in listeners}) == 8
    with pytest.raises(OSError, match=r"cannot listen on 127\.0\.0\.1"):
        Listener(port=listeners[0].port)
    for listener in listeners[1:]:
        listener.close()
        listener.close()
    first = listeners[0]
    code = f"import socket; s = socket.socket(fileno={first.fileno()}); c, _ = s.accept(); c.sendall(b'hello'); c.close()"
    # The client is in the backlog before anybody accepts.
    client = socket.create_connection((first.host, first.port), timeout=20)
    child = subprocess.Popen([sys.executable, "-c", code], pass_fds=[first.fileno()])
    first.close()
    assert client.recv(5) == b"hello"
    assert child.wait(20) == 0
    client.close()


def test_addresses():
    assert net.is_loopback("127.0.0.1") and net.is_loopback("::1") and net.is_loopback("localhost")
    assert not net.is_loopback("10.0.0.1") and not net.is_loopback("some-host")
    assert net.source_address("127.0.0.1") == "127.0.0.1"
    assert net.interface_of("127.0.0.1") == net.loopback_interface()
    assert net.interface_of("203.0.113.7") is None
    assert net.resolve("localhost") in ("127.0.0.1", "::1")
    with Listener() as listener:
        assert net.is_open(listener.fileno())
    assert not net.is_open(10**6)
    fd = Listener().detach()
    assert net.is_open(fd)
    os.close(fd)


@pytest.mark.parametrize(("job", "size"), [("stateless", 3), ("stateless_torch", 2)])
def test_stateless(job, size):
    run_ranks(f"{JOBS}:{job}", size, free_port(), init=False)


def test_stateless_barrier_keeps_its_timeout():
    found = run_ranks(f"{JOBS}:stateless_barrier", 3, free_port(), init=False)
    for rank in (0, 2):
        text, took = found[rank]
        assert "ranks [1] did not arrive" in text and 0.4 < took < 5


def test_stateless_groups_know_their_hosts():
    assert run_ranks(f"{JOBS}:stateless_nodes", 2, free_port(), init=False) == [([True, True], 1)] * 2
