"""Embeddings: one vector for a prompt, of the hidden states after the last norm.

    last    the last position's
    mean    of all positions: summed one by one in their order, in float64, so that no chunking can change a bit

Only the output rank does it: every split gives it the same hidden states.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch

from lockstep.protocol import StepPlan
from lockstep.worker.batch import F64, BatchState
from lockstep.worker.inputs import StepInputs

PIECE_BYTES = 8 << 20  # of float64 rows held at once


class Pooler:
    """The sums of the prompts that are computed in chunks, by slot."""

    def __init__(self) -> None:
        self._sums: dict[int, F64] = {}

    def apply(self, plan: StepPlan) -> None:
        """Forget who leaves."""
        for slot in plan.freed:
            self._sums.pop(slot, None)

    def take(self, hidden: torch.Tensor, inputs: StepInputs, state: BatchState) -> list[tuple[int, bytes]]:
        """(slot, its vector as float32) of every prompt that asked for one and ends with this step's `hidden [tokens, hidden]`."""
        found = []
        after = np.cumsum(inputs.query_lens)
        for row in np.flatnonzero(state.pools[inputs.slots]).tolist():
            slot, end, at = int(inputs.slots[row]), int(inputs.seq_lens[row]), int(after[row])
            start, size = end - int(inputs.query_lens[row]), int(state.prompt_lens[slot])
            if state.pooling[slot] == "mean":
                self._add(slot, start, hidden[at - (end - start) : at])
            if end == size:
                vector = self._sums.pop(slot) / size if state.pooling[slot] == "mean" else as_f64(hidden[at - 1])
                found.append((slot, vector.astype("<f4").tobytes()))
        return found

    def _add(self, slot: int, start: int, rows: torch.Tensor) -> None:
        """Add the hidden states of positions `start` and on."""
        assert start == 0 or slot in self._sums, f"slot {slot}: position {start} is to be added to nothing"
        total = self._sums[slot] if start else np.zeros(rows.shape[1])
        step = max(1, PIECE_BYTES // (8 * rows.shape[1]))
        for first in range(0, len(rows), step):
            # accumulate adds row after row; sum might add in pairs
            total = np.add.accumulate(np.concatenate([total[None], as_f64(rows[first : first + step])]), axis=0)[-1]
        self._sums[slot] = total.copy()


def as_f64(rows: torch.Tensor) -> npt.NDArray[np.float64]:
    """A copy in float64, of whatever type and device."""
    return rows.to("cpu", torch.float64).numpy().copy()
