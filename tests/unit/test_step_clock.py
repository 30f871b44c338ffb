"""The clock of a calibration: what it adds up, and that it leaves nothing behind."""

from __future__ import annotations

from typing import Any

import numpy as np

from lockstep.worker.step_clock import StepClock


class Native:
    """A program of three operations, the last of which no step has."""

    def __init__(self) -> None:
        self.timed, self.steps = False, 0

    def time_operations(self, on: bool) -> None:
        self.timed = on

    def forward(self, x: int) -> int:
        self.steps += 1
        return x + 1

    def clocks(self) -> tuple[Any, Any]:
        assert self.timed
        return np.array([10.0, 12.0, 99.0]), np.array([10.0 + self.steps, 12.5, 0.0])


class Model:
    def __init__(self) -> None:
        self.native = Native()

    def compute_top_tokens(self, x: int) -> int:
        return x * 2


def test_it_adds_up_operations_and_the_choice_of_tokens(monkeypatch):
    times = iter(range(100, 200))
    monkeypatch.setattr("lockstep.worker.step_clock.time.perf_counter", lambda: float(next(times)))
    model = Model()
    clock = StepClock(model)  # type: ignore[arg-type]
    assert model.compute_top_tokens(model.native.forward(1)) == 4
    assert model.native.forward(2) == 3
    assert clock.close() == [1.0 + 0.5 + 1.0, 2.0 + 0.5]


def test_it_leaves_the_model_as_it_was():
    model = Model()
    mine = model.compute_top_tokens = lambda x: x * 3  # type: ignore[method-assign]
    clock = StepClock(model)  # type: ignore[arg-type]
    assert model.compute_top_tokens is not mine and model.native.timed
    clock.close()
    assert model.compute_top_tokens is mine and "forward" not in vars(model.native) and not model.native.timed
