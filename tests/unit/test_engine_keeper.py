"""What the keeper makes of an engine's last words; no process is started."""

from __future__ import annotations

import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from lockstep.cluster.operate import Mode
from lockstep.config.build import build_config
from lockstep.config.validate import resolve
from lockstep.executor.contract import ExecutorError
from lockstep.frontend import engine_keeper
from lockstep.frontend.engine_keeper import EngineKeeper
from lockstep.server.launch import end
from lockstep.utils import procs


class Handle:
    """Stands in for an engine's process that says what the test has it say."""

    made: list[Handle]
    pid, ready, worked, late, again = 0, True, True, False, False
    error: ExecutorError | None = None

    def __init__(self, *args: Any, mode: Mode, restarts: int, **options: Any) -> None:
        self.mode, self.restarts, self.below = mode, restarts, list[tuple[int, int]]()
        self.made.append(self)

    @property
    def heard_s(self) -> float:
        return time.monotonic()

    def fileno(self) -> int:
        return 0

    def wait(self) -> None:
        pass

    def failure(self) -> ExecutorError | None:
        return self.error

    def close(self) -> None:
        pass


@pytest.fixture
def keeper(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[EngineKeeper]:
    Handle.made = []
    monkeypatch.setattr(engine_keeper, "EngineHandle", Handle)
    monkeypatch.setattr(engine_keeper.procs, "kill_group", lambda pid: None)
    config, spec, folder = resolve(build_config(device="cpu", incident_dir=str(tmp_path)))
    found = EngineKeeper(config, spec, folder)
    found.wait()
    yield found
    found.close()


class Killed(Handle):
    """One whose process ends when it is killed, and not before."""

    pid, alive = 4711, True

    def close(self) -> None:
        assert not self.alive, "it is waited for"


@pytest.fixture
def stubborn(keeper: EngineKeeper, monkeypatch: pytest.MonkeyPatch) -> Iterator[Killed]:
    found = keeper._handle = Killed(mode=Mode(), restarts=0)

    def kill_group(pid: int) -> None:
        found.alive = found.alive and pid != found.pid

    monkeypatch.setattr(engine_keeper.procs, "kill_group", kill_group)
    yield found


def test_at_once_is_without_a_wait(keeper: EngineKeeper, stubborn: Killed) -> None:
    keeper.kill()
    keeper.close()
    assert not stubborn.alive


def test_a_signal_during_the_end_is_the_end_at_once(keeper: EngineKeeper, stubborn: Killed, monkeypatch: pytest.MonkeyPatch) -> None:
    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(stubborn, "close", lambda: (signal.raise_signal(signal.SIGTERM), Killed.close(stubborn)))
    assert end(keeper, at_once=False) == 128 + signal.SIGTERM
    assert not stubborn.alive and signal.getsignal(signal.SIGTERM) is before


def test_what_is_below_a_killed_engine_does_not_outlive_it(keeper: EngineKeeper, stubborn: Killed, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_keeper, "BELOW_S", 0.1)
    with subprocess.Popen(["sleep", "60"], start_new_session=True) as below:
        stubborn.below = [(below.pid, procs.birth(below.pid)), (1, 1)]
        monkeypatch.setattr(
            engine_keeper.procs, "kill_group", lambda pid: below.kill() if pid == below.pid else setattr(stubborn, "alive", False)
        )
        keeper.kill()
        keeper.close()
        assert below.wait(20) == -signal.SIGKILL


def another(keeper: EngineKeeper) -> Handle:
    """The one that takes the first's place."""
    give_up_s = time.monotonic() + 20
    while len(Handle.made) < 2:
        assert keeper.failure() is None and time.monotonic() < give_up_s
    return Handle.made[1]


def test_who_says_that_it_has_given_up_is_the_last(keeper: EngineKeeper) -> None:
    (first,) = Handle.made
    first.error = ExecutorError("replica 0 was given up")
    assert keeper.failure() is first.error and keeper.failure() is first.error
    assert len(Handle.made) == 1


def test_who_says_that_another_may_do_better_is_replaced(keeper: EngineKeeper) -> None:
    (first,) = Handle.made
    first.again, first.error = True, ExecutorError("rank 1 died")
    assert another(keeper).restarts == 1


def test_the_next_one_stands_still_if_this_one_did(keeper: EngineKeeper) -> None:
    (first,) = Handle.made
    first.mode = Mode(paused=True, sleep_level=2)
    assert keeper.failure() is None
    first.error = ExecutorError("killed", exitcode=-9)
    assert another(keeper).mode == Mode(paused=True, sleep_level=2)
