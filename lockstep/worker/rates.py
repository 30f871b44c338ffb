"""How long each kind of operation takes on this rank: the engine's own program over a model made for the purpose.

What calibration asks a rank for. The model has the shape that is asked for and random weights, its KV cache is spread over
blocks as a real one's is, and it is gone afterwards. Collective where the model is cut over the TP group.
"""

from __future__ import annotations

import re
import time
from collections import defaultdict
from collections.abc import Sequence
from statistics import median
from typing import Any

import msgspec
import numpy as np
import torch

from lockstep.attention.batch import AttentionBatch
from lockstep.config.model_spec import ModelSpec
from lockstep.distributed.groups import ParallelGroups
from lockstep.models.decoder import DecoderModel
from lockstep.models.registry import build_model
from lockstep.worker import kv

LEAST_RUNS, MOST_RUNS = 3, 100
_LAYER = re.compile(r"layers\.\d+\.")
Case = tuple[int, int, int]  # rows, tokens that each computes, tokens that each holds afterwards


def operation_seconds(
    spec: dict[str, Any], cases: Sequence[Case], seconds: float, *, groups: ParallelGroups, dtype: torch.dtype, block_size: int,
    quantization: str | None = None,
) -> list[dict[str, float]]:  # fmt: skip
    """For each case the median seconds of one operation of each kind, "head" (logits and argmax) and "step" (all of it).

    seconds: about how long all cases take together.
    """
    return Rehearsal(msgspec.convert(spec, ModelSpec), cases, groups, dtype, block_size, quantization).run(cases, seconds)


class Rehearsal:
    """A model of random weights with room for `cases`."""

    def __init__(
        self, spec: ModelSpec, cases: Sequence[Case], groups: ParallelGroups, dtype: torch.dtype, block_size: int, quantization: str | None
    ) -> None:
        self.groups, self.block_size = groups, block_size
        self.model: DecoderModel = build_model(spec, groups, dtype, "cpu")
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for parameter in self.model.parameters():
                parameter.uniform_(-0.05, 0.05, generator=generator)
        self.model.pack(max(rows * tokens for rows, tokens, _ in cases), quantization)
        self.blocks = max(rows * -(-length // block_size) for rows, _, length in cases)
        caches = kv.allocate(self.model.kv_layers(), self.blocks, block_size, dtype=dtype, device=torch.device("cpu"))
        for cache in caches:
            cache.zero_()  # so that every page is memory of its own
        self.model.bind_kv(caches)
        assert self.model.native is not None
        self.model.native.time_operations(True)

    @torch.inference_mode()
    def run(self, cases: Sequence[Case], seconds: float) -> list[dict[str, float]]:
        """See `operation_seconds`. Ranks begin each case together."""
        return [self._case(case, seconds / len(cases)) for case in cases]

    def _case(self, case: Case, seconds: float) -> dict[str, float]:
        rows, tokens, length = case
        width = -(-length // self.block_size)
        tables = np.random.default_rng(0).permutation(self.blocks)[: rows * width].reshape(rows, width)
        batch = AttentionBatch.build([tokens] * rows, [length] * rows, tables, self.block_size)
        ids = torch.zeros(rows * tokens, dtype=torch.int64)
        took: dict[str, list[float]] = defaultdict(list)
        for _ in range(self._runs(ids, batch, rows, seconds)):
            for kind, value in self._once(ids, batch, rows).items():
                took[kind].append(value)
        return {kind: median(values) for kind, values in took.items()}

    def _runs(self, ids: torch.Tensor, batch: AttentionBatch, rows: int, seconds: float) -> int:
        """How many fill `seconds`, the same on all ranks of the group."""
        self._once(ids, batch, rows)
        began = time.perf_counter()
        self._once(ids, batch, rows)
        took = torch.tensor([time.perf_counter() - began], dtype=torch.float64)
        slowest = float(self.groups.tp.all_gather(took, 0).max())
        return int(min(MOST_RUNS, max(LEAST_RUNS, seconds / max(slowest, 1e-6))))

    def _once(self, ids: torch.Tensor, batch: AttentionBatch, rows: int) -> dict[str, float]:
        """One step: by kind, the mean over its operations."""
        native = self.model.native
        assert native is not None
        began = time.perf_counter()
        hidden = native.forward(ids, batch, None)
        assert isinstance(hidden, torch.Tensor)
        middle = time.perf_counter()
        self.model.compute_top_tokens(hidden[:rows])
        ended = time.perf_counter()
        kinds: dict[str, list[float]] = defaultdict(list)
        for name, start, stop in native.operation_times():
            kinds[_LAYER.sub("", name).partition(".")[0]].append(stop - start)
        found = {kind: sum(values) / len(values) for kind, values in kinds.items()}
        return found | {"head": ended - middle, "forward": middle - began, "step": ended - began}
