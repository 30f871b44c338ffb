"""Pooling by hand: whatever the chunks, whoever had the slot before."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from lockstep.protocol import NewRequest, Pooling, SamplingParams, StepPlan
from lockstep.worker import pooling
from lockstep.worker.batch import BatchState
from lockstep.worker.inputs import build_inputs
from lockstep.worker.pooling import Pooler

HIDDEN, SIZE = 24, 61


def states(seed: int = 0) -> torch.Tensor:
    """The hidden states of a prompt; large and small ones, so that the order of a sum shows."""
    made = torch.randn(SIZE, HIDDEN, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return (made * torch.logspace(-6, 6, SIZE, dtype=torch.float64)[:, None]).float()


def in_order(rows: torch.Tensor) -> list[float]:
    total = np.zeros(HIDDEN)
    for row in rows.double().numpy():
        total = total + row
    return (total / len(rows)).astype(np.float32).tolist()


class Life:
    """A batch state and a pooler over hidden states that a test hands in."""

    def __init__(self) -> None:
        self.state, self.pooler = BatchState(4, 128, 16), Pooler()

    def start(self, slot: int, kind: Pooling | None, freed: bool = False) -> None:
        tokens = list(range(SIZE))
        new = NewRequest(slot, f"r{slot}", tokens, SIZE, list(range(4)), SamplingParams(), 0, pooling=kind)
        plan = StepPlan(0, [], [], [], [], new=[new], freed=[slot] if freed else [])
        self.state.apply(plan)
        self.pooler.apply(plan)

    def step(self, *rows: tuple[int, int, int, torch.Tensor]) -> dict[int, list[float]]:
        """Compute positions [start, end) of slots, of which each has its hidden states. Vectors by slot."""
        slots, starts, ends, hidden = zip(*rows, strict=True)
        plan = StepPlan(1, list(slots), list(starts), [e - s for s, e in zip(starts, ends, strict=True)], [False] * len(rows))
        joined = torch.cat([h[s:e] for s, e, h in zip(starts, ends, hidden, strict=True)])
        found = self.pooler.take(joined, build_inputs(self.state, plan), self.state)
        return {slot: np.frombuffer(vector, "<f4").tolist() for slot, vector in found}


@pytest.mark.parametrize("chunk", [1, 2, 7, 16, 60, SIZE])
def test_no_chunking_changes_a_bit(chunk: int) -> None:
    life = Life()
    life.start(0, "mean")
    life.start(1, "last")
    life.start(2, None)
    for start in range(0, SIZE, chunk):
        end = min(SIZE, start + chunk)
        found = life.step((0, start, end, states(1)), (2, start, end, states(2)), (1, start, end, states(3)))
        assert (found != {}) == (end == SIZE)
    assert found == {0: in_order(states(1)), 1: states(3)[-1].tolist()}
    assert not life.pooler._sums


def test_a_long_chunk_is_added_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pooling, "PIECE_BYTES", 8 * HIDDEN * 3)
    life = Life()
    life.start(0, "mean")
    assert life.step((0, 0, SIZE, states()))[0] == in_order(states())


def test_one_that_was_preempted_begins_anew() -> None:
    life = Life()
    life.start(0, "mean")
    life.step((0, 0, 20, states(1)))
    life.start(0, "mean", freed=True)
    life.step((0, 0, 30, states(2)))
    assert life.step((0, 30, SIZE, states(2)))[0] == in_order(states(2))


def test_a_mean_without_its_beginning_is_never_given() -> None:
    life = Life()
    life.start(0, "mean")
    with pytest.raises(AssertionError, match="added to nothing"):
        life.step((0, 16, SIZE, states()))


def test_the_vector_is_a_copy() -> None:
    """The hidden states' memory is the next step's."""
    life, hidden = Life(), states()
    life.start(0, "mean")
    life.step((0, 0, 20, hidden))
    kept = hidden.clone()
    hidden[:20] = 0
    assert life.step((0, 20, SIZE, hidden))[0] == in_order(kept)
