"""How long each kind of operation takes on this rank: the engine's own program over a model made for the purpose.

What calibration asks a rank for. The model has the shape that is asked for and random weights, and its KV cache is spread over
blocks as a real one's is. It is kept for the next time that it is asked for. Collective where the model is cut over the TP group.
"""

from __future__ import annotations

import re
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from statistics import mean
from typing import Any

import msgspec
import numpy as np
import torch

from lockstep.attention.batch import AttentionBatch
from lockstep.config.model_spec import ModelSpec
from lockstep.distributed.group import GroupCoordinator
from lockstep.distributed.groups import ParallelGroups
from lockstep.models.decoder import DecoderModel
from lockstep.models.registry import build_model
from lockstep.utils.noise import undisturbed
from lockstep.worker import kv

MOST_RUNS = 100
LEAST_RUNS, SHORT_S = 2, 0.03  # with warm caches, of a step that takes no longer than that
NOISE = 1 << 20  # random numbers: all weights are copies of them
_LAYER = re.compile(r"layers\.\d+\.")
Of = Callable[[Iterable[float]], float]  # which of several runs counts
Case = tuple[int, int, int]  # rows, tokens that each computes, tokens that each holds afterwards


class Rehearsals:
    """The models that this rank has been asked for, as long as it lives: making one takes longer than asking it."""

    def __init__(self, groups: ParallelGroups, dtype: torch.dtype, block_size: int, quantization: str | None) -> None:
        self.groups, self.dtype, self.block_size, self.quantization = groups, dtype, block_size, quantization
        self._made: dict[tuple[bytes, bool], Rehearsal] = {}

    def seconds(
        self, spec: dict[str, Any], cases: Sequence[Case], seconds: float, *, alone: bool, usual: bool, meeting: GroupCoordinator
    ) -> list[dict[str, float]]:
        """For each case the undisturbed seconds of one operation of each kind, and "head" (logits and the choice of a token).

        seconds: about how long all cases may take; one for which there is no time any more runs as little as it can. Small cases
        should come first. alone: the whole model on this rank, not a part of it. usual: means, not what is undisturbed. meeting: the
        ranks that measure at the same time.
        """
        key = msgspec.json.encode(spec), alone
        if key not in self._made or not self._made[key].has_room(cases):
            self._made.pop(key, None)
            groups = ParallelGroups.solo() if alone else self.groups
            model = msgspec.convert(spec, ModelSpec)
            self._made[key] = Rehearsal(model, cases, groups, self.dtype, self.block_size, self.quantization)
        return self._made[key].run(cases, seconds, meeting, mean if usual else undisturbed)


class Rehearsal:
    """A model of random weights with room for `cases`."""

    def __init__(
        self, spec: ModelSpec, cases: Sequence[Case], groups: ParallelGroups, dtype: torch.dtype, block_size: int, quantization: str | None
    ) -> None:
        self.block_size = block_size
        self.model: DecoderModel = build_model(spec, groups, dtype, "cpu")
        noise = torch.empty(NOISE, dtype=dtype).uniform_(-0.05, 0.05, generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            for parameter in self.model.parameters():
                for part in parameter.view(-1).split(NOISE):  # drawing each number would take longer than what is measured
                    part.copy_(noise[: len(part)])
        self.tokens, self.blocks = self._room(cases)
        self.model.pack(self.tokens, quantization)
        caches = kv.allocate(self.model.kv_layers(), self.blocks, block_size, dtype=dtype, device=torch.device("cpu"))
        for cache in caches:
            cache.zero_()  # so that every page is memory of its own
        self.model.bind_kv(caches)
        assert self.model.native is not None
        self.model.native.time_operations(True)

    def _room(self, cases: Sequence[Case]) -> tuple[int, int]:
        """The most tokens of a step, and the blocks of KV cache, that `cases` need."""
        return max(rows * tokens for rows, tokens, _ in cases), max(rows * -(-length // self.block_size) for rows, _, length in cases)

    def has_room(self, cases: Sequence[Case]) -> bool:
        """Whether `cases` need no more than the model was made for."""
        tokens, blocks = self._room(cases)
        return tokens <= self.tokens and blocks <= self.blocks

    @torch.inference_mode()
    def run(self, cases: Sequence[Case], seconds: float, meeting: GroupCoordinator, of: Of) -> list[dict[str, float]]:
        """See `Rehearsals.seconds`."""
        found: list[dict[str, float]] = []
        left, turns = seconds, len(cases)
        for case in cases:
            times, spent = self._case(case, left / turns, meeting, of)
            found.append(times)
            left, turns = max(0.0, left - spent), turns - 1
        return found

    def _case(self, case: Case, seconds: float, meeting: GroupCoordinator, of: Of) -> tuple[dict[str, float], float]:
        """Its times, and what finding them took. The first run counts only where another one would take long."""
        rows, tokens, length = case
        width = -(-length // self.block_size)
        tables = np.random.default_rng(0).permutation(self.blocks)[: rows * width].reshape(rows, width)
        batch = AttentionBatch.build([tokens] * rows, [length] * rows, tables, self.block_size)
        ids = torch.zeros(rows * tokens, dtype=torch.int64)
        meeting.barrier()  # what others read from memory meanwhile is part of the answer
        began = time.perf_counter()
        took = [self._once(ids, batch, rows)]
        once = slowest(time.perf_counter() - began, meeting)
        if (runs := max(int(min(MOST_RUNS, seconds / once - 1)), LEAST_RUNS if once < SHORT_S else 0)) > 0:
            meeting.barrier()
            took = [self._once(ids, batch, rows) for _ in range(runs)]
        return {kind: of(one[kind] for one in took) for kind in took[0]}, once * (1 + runs)

    def _once(self, ids: torch.Tensor, batch: AttentionBatch, rows: int) -> dict[str, float]:
        """One step: by kind, the mean over its operations."""
        native = self.model.native
        assert native is not None
        hidden = native.forward(ids, batch, None)
        assert isinstance(hidden, torch.Tensor)
        middle = time.perf_counter()
        self.model.compute_top_tokens(hidden[:rows])
        ended = time.perf_counter()
        kinds: dict[str, list[float]] = defaultdict(list)
        for name, start, stop in native.operation_times():
            kinds[_LAYER.sub("", name).partition(".")[0]].append(stop - start)
        kinds.pop("narrow", None)  # nothing is left out of these steps
        found = {kind: sum(values) / len(values) for kind, values in kinds.items()}
        return found | {"head": ended - middle}


def slowest(seconds: float, ranks: GroupCoordinator) -> float:
    """The longest of the ranks' times: all must come to the same number of runs."""
    return max(float(ranks.all_gather(torch.tensor([seconds], dtype=torch.float64), 0).max()), 1e-6)
