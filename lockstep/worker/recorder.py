"""What a rank computed, position by position, so that two runs can be compared bit for bit (`lockstep verify`).

A request is known by its sampling seed, which greedy decoding does not use otherwise. Of the residual stream after each
layer a digest is kept; of the logits, every bit.
"""

from __future__ import annotations

from hashlib import blake2b
from pathlib import Path

import numpy as np
import numpy.typing as npt
from torch import Tensor, uint8

from lockstep.worker.batch import BatchState
from lockstep.worker.inputs import StepInputs

Key = tuple[int, int]  # (seed of the request, position in it)


class Recorder:
    """Told what happens in each step, between `begin` and the next `begin`."""

    def __init__(self) -> None:
        self._layers: dict[Key, dict[int, int]] = {}
        self._logits: dict[Key, npt.NDArray[np.float32]] = {}
        self._tokens: list[Key] = []
        self._sampled: list[Key] = []

    def begin(self, inputs: StepInputs, state: BatchState) -> None:
        """A step with these rows begins."""
        seeds = np.repeat(state.seeds[inputs.slots], inputs.query_lens)
        self._tokens = list(zip(seeds.tolist(), inputs.positions.tolist(), strict=True))
        self._sampled = [self._tokens[i] for i in inputs.last_tokens.tolist()]

    def layer(self, index: int, stream: Tensor) -> None:
        """The residual stream `[tokens, hidden]` after layer `index`."""
        rows = stream.contiguous().view(uint8).numpy()
        for key, row in zip(self._tokens, rows, strict=True):
            digest = int.from_bytes(blake2b(row, digest_size=8).digest(), "little")
            known = self._layers.setdefault(key, {}).setdefault(index, digest)
            assert known == digest, f"request {key[0]}, position {key[1]}, layer {index}: computed again, with other bits"

    def logits(self, logits: Tensor) -> None:
        """The logits `[sampled rows, vocab]`."""
        for key, row in zip(self._sampled, logits.numpy(), strict=True):
            self._logits[key] = row.copy()

    def save(self, path: Path) -> None:
        """Write all to `path` (npz): layer_keys, layer_numbers, digests `[positions, layers]`; logit_keys, logits."""
        numbers = sorted({index for found in self._layers.values() for index in found})
        np.savez(
            path,
            layer_keys=np.array(list(self._layers), np.int64).reshape(-1, 2),
            layer_numbers=np.array(numbers, np.int64),
            digests=np.array([[found[i] for i in numbers] for found in self._layers.values()], np.uint64),
            logit_keys=np.array(list(self._logits), np.int64).reshape(-1, 2),
            logits=np.array(list(self._logits.values()), np.float32),
        )
