"""A keeper of replicas for a leader elsewhere: how often it starts one again, and what makes it stop."""

from __future__ import annotations

import socket
import threading
from pathlib import Path

import pytest

from lockstep.cluster import keeper
from lockstep.cluster.greeting import RefusedError
from lockstep.cluster.keeper import Keeper
from lockstep.cluster.replica_main import LOST_ROUTER
from lockstep.cluster.supervisor import RestartPolicy
from lockstep.config.errors import ConfigError
from lockstep.testing.executors import SPEC, fake_config


class Script(Keeper):
    """Its leader and its processes follow a script: (exit code, whether it brought tokens) of each."""

    def __init__(self, folder: Path, lives: list[tuple[int, bool]]) -> None:
        config = fake_config(1, data_parallel_size=2, data_parallel_size_local=1, data_parallel_start_rank=1, data_parallel_rpc_port=1)
        super().__init__(config, SPEC, folder, "key")
        self.lives, self.pauses = lives, []
        self._stopping = Pauses(self.pauses)

    def _connect(self, replica: int, welcomed: bool) -> socket.socket | None:
        if not self.lives:
            raise RefusedError("replica 1 was given up after 8 failures in a row")
        return socket.socket()

    def _serve(self, replica: int, connection: socket.socket) -> tuple[int, bool]:
        connection.close()
        return self.lives.pop(0)


class Pauses(threading.Event):
    """Nobody waits; what was to be waited is noted."""

    def __init__(self, pauses: list[float]) -> None:
        super().__init__()
        self.pauses = pauses

    def wait(self, timeout: float | None = None) -> bool:
        self.pauses.append(timeout or 0.0)
        return False


def pauses_of(folder: Path, lives: list[tuple[int, bool]]) -> list[float]:
    """Keep the replica until the leader refuses it."""
    kept = Script(folder, list(lives))
    with pytest.raises(ConfigError, match="refused replica 1: replica 1 was given up"):
        kept.run()
    kept.close(0.0)
    assert not kept.lives, "it gave up by itself"
    return kept.pauses


@pytest.fixture(autouse=True)
def policy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keeper, "PAUSES", RestartPolicy(first_s=1.0, factor=2.0, most_s=8.0, most_failures=4))


def test_a_replica_that_works_is_always_started_again(tmp_path: Path) -> None:
    assert pauses_of(tmp_path, [(-9, True)] * 50) == [1.0] * 50


def test_to_lose_the_leader_is_no_fault_of_the_replica(tmp_path: Path) -> None:
    assert pauses_of(tmp_path, [(LOST_ROUTER, False)] * 50) == [1.0] * 50


def test_one_that_dies_without_work_waits_longer_each_time_until_the_leader_refuses_it(tmp_path: Path) -> None:
    assert pauses_of(tmp_path, [(-9, False)] * 6 + [(-9, True), (-9, False)]) == [1.0, 2.0, 4.0, 8.0, 8.0, 8.0, 1.0, 2.0]


def test_a_pause_has_a_number_after_any_number_of_failures() -> None:
    assert RestartPolicy().pause_s(100_000) == 30.0
