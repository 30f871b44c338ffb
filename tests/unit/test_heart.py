"""A replica's heart: it beats whatever happens, and knows what the engine is at."""

from __future__ import annotations

import threading
from types import SimpleNamespace
from typing import Any

import pytest

from lockstep.cluster import heart, wire
from lockstep.cluster.heart import Heart
from lockstep.config.tree import EngineConfig
from lockstep.engine.core import EngineCore
from lockstep.executor.contract import ExecutorError
from lockstep.testing.fakes import FakeExecutor
from tests.unit.test_engine_core import engine


class Watched(FakeExecutor):
    """Notes what the engine says of itself while a rank gives its memory back, or takes it again."""

    core: EngineCore

    def sleep(self, level: int) -> None:
        assert self.core.busy_since_s is not None and self.core.moving_memory

    wake_up = sleep


def test_an_engine_that_sleeps_or_wakes_up_is_at_work() -> None:
    executor = Watched()
    executor.wake_up = lambda: executor.sleep(0)  # type: ignore[method-assign, assignment, call-arg]
    core = executor.core = engine(executor)
    core.sleep(1)
    assert core.busy_since_s is None and not core.moving_memory
    core.wake_up()
    assert core.busy_since_s is None and not core.moving_memory


def made(core: Any, said: list[Any], ends: list[ExecutorError]) -> Heart:
    return Heart(core, said.append, ends.append)


def stuck(moving: bool) -> Any:
    """An engine that has been at one thing since the machine started."""
    executor = SimpleNamespace(health=list)
    return SimpleNamespace(
        config=EngineConfig(), executor=executor, busy_since_s=-1e9, moving_memory=moving, report=lambda: None, stats=lambda: None
    )


@pytest.mark.parametrize("moving", [False, True])
def test_who_is_stuck_is_ended_with_the_limit_as_it_was_set(moving: bool) -> None:
    ends: list[ExecutorError] = []
    core = stuck(moving)
    made(core, [], ends).beat()
    (error,) = ends
    name = "startup_timeout_seconds" if moving else "execute_model_timeout_seconds"
    config = core.config.runtime if moving else core.config.parallel
    assert f"({name}={getattr(config, name):g})" in str(error)


def test_a_beat_that_fails_is_not_the_last(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heart, "PULSE_S", 0.01)
    core, said, enough = engine(FakeExecutor()), [], threading.Event()
    report = core.report
    beats = 0

    def sometimes() -> Any:
        nonlocal beats
        beats += 1
        if beats <= 2:
            raise RuntimeError("dictionary changed size during iteration")
        return report()

    core.report = sometimes  # type: ignore[method-assign]

    def say(reply: Any) -> None:
        said.append(reply)
        enough.set()
        if len(said) > 1:
            raise ConnectionError  # the end of the thread

    Heart(core, say, lambda error: None).start()
    assert enough.wait(5)
    assert isinstance(said[0], wire.Pulse) and said[0].report.stats.steps == 0
