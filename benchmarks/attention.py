#!/usr/bin/env python3
"""Our attention kernel beside torch's scaled_dot_product_attention and beside reading the same bytes, in one run, turn by turn.

`python benchmarks/attention.py [--threads 1] [--dtype bfloat16]` prints one JSON line per case: decode of a batch over
cached contexts, and causal prefill of one prompt. torch gets its keys and values contiguous, which a paged cache would
have to gather first; ours reads the paged cache. Layers enough that nothing stays in a core's own cache.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from statistics import median
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from lockstep.attention.batch import AttentionBatch
from lockstep.kernels.library import DTYPE_CODES, choose, library

BLOCK_SIZE = 16
LAYER_BYTES = 96 << 20  # keys and values of all layers of a decode case


class Case:
    """`rows` rows whose last `queries` of `length` tokens are computed, by each of the contestants, in `layers` layers."""

    def __init__(self, lib: Any, rows: int, queries: int, length: int, num_q: int, num_kv: int, head_dim: int, dtype: torch.dtype) -> None:
        blocks = -(-length // BLOCK_SIZE)
        elements = rows * blocks * BLOCK_SIZE * num_kv * head_dim
        self.layers = 1 if queries > 1 else max(1, LAYER_BYTES // (2 * elements * dtype.itemsize))
        self.bytes_read = self.layers * 2 * rows * length * num_kv * head_dim * dtype.itemsize
        self.flops = 4 * num_q * head_dim * rows * sum(range(length - queries + 1, length + 1)) * self.layers
        self.lib, self.causal, scale = lib, queries > 1, head_dim**-0.5
        generator = torch.Generator().manual_seed(0)

        def draw(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator).to(dtype)

        width = num_q // num_kv
        self.q = draw(rows * queries, num_q * head_dim)
        # Group members are further queries where every query sees all keys, else further batch rows: nothing is repeated.
        if self.causal:
            self.torch_q = self.q.view(queries, num_kv, width, head_dim).permute(2, 1, 0, 3).contiguous()
            kv_shape = (2, num_kv, length, head_dim)
        else:
            self.torch_q = self.q.view(rows, num_kv, width, head_dim)
            kv_shape = (2, rows, num_kv, length, head_dim)
        self.contiguous = draw(*kv_shape).expand(self.layers, *([-1] * len(kv_shape))).contiguous()
        self.paged = draw(2 * elements).expand(self.layers, -1).contiguous().view(self.layers, 2, rows * blocks, -1)
        self.out = torch.empty(rows * queries, num_q * head_dim, dtype=dtype)
        self.program, self.step = lib.program_new(), lib.step_new()
        self.kv_of_q = torch.arange(num_q, dtype=torch.int32) // width
        code = DTYPE_CODES[str(dtype).removeprefix("torch.")]
        for layer in self.paged:
            op = lib.op_attention(
                self.q.data_ptr(), self.q.stride(0), self.out.data_ptr(), self.out.stride(0), num_q, num_kv, head_dim,
                self.kv_of_q.data_ptr(), scale, 0, 0.0, layer.data_ptr(), rows * blocks, BLOCK_SIZE, code,
            )  # fmt: skip
            lib.program_add(self.program, op, "attention")
        deal = torch.randperm(rows * blocks, generator=generator).view(rows, blocks)
        batch = AttentionBatch.build([queries] * rows, [length] * rows, deal, BLOCK_SIZE)
        self.tables, self.batch = deal.to(torch.int32), batch
        self.start, self.seqs = torch.from_numpy(batch.query_start), torch.from_numpy(batch.seq_lens)
        arrays = (batch.num_tokens, 0, batch.positions.data_ptr(), batch.slot_mapping.data_ptr())
        lib.step_set(self.step, *arrays, rows, self.start.data_ptr(), self.seqs.data_ptr(), self.tables.data_ptr(), blocks, None, 0)

    def ours(self) -> None:
        self.lib.program_run(self.program, self.step, 0)

    def torch(self) -> None:
        for k, v in self.contiguous:
            if self.causal:
                k, v = k.expand(self.torch_q.shape[0], -1, -1, -1), v.expand(self.torch_q.shape[0], -1, -1, -1)
            F.scaled_dot_product_attention(self.torch_q, k, v, is_causal=self.causal)

    def read(self) -> None:
        for layer in self.contiguous:
            layer.view(torch.int64).sum()

    def close(self) -> None:
        self.lib.program_free(self.program)
        self.lib.step_free(self.step)


def timed(call: Callable[[], None]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def compare(case: Case, seconds: float) -> dict[str, float]:
    """Medians in seconds, and the medians of the ratios within each turn."""
    contestants: dict[str, Callable[[], None]] = {"ours": case.ours, "torch": case.torch, "read": case.read}
    turns: list[dict[str, float]] = []
    for call in contestants.values():
        call()
    until = time.perf_counter() + seconds
    while len(turns) < 3 or time.perf_counter() < until:
        turns.append({name: timed(call) for name, call in contestants.items()})
    found = {f"{name}_ms": round(1e3 * median(t[name] for t in turns), 3) for name in contestants}
    found["torch_over_ours"] = round(median(t["torch"] / t["ours"] for t in turns), 2)
    found["read_over_ours"] = round(median(t["read"] / t["ours"] for t in turns), 2)
    found["read_GBps"] = round(case.bytes_read / 1e9 / median(t["read"] for t in turns), 1)
    found["ours_GFLOPs"] = round(case.flops / 1e9 / median(t["ours"] for t in turns), 1)
    return found | {"turns": len(turns)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"])
    parser.add_argument("--seconds", type=float, default=2.0, help="for each case")
    parser.add_argument("--only", default="", choices=["", "decode", "prefill"])
    args = parser.parse_args()
    lib, variant = library(), choose()
    if lib is None or variant is None:
        raise SystemExit("there are no CPU kernels here")
    torch.set_num_threads(args.threads)
    lib.team_set(args.threads, 0, 0)
    cases = [("decode", rows, 1, length) for rows, length in ((8, 128), (8, 512), (8, 2048), (1, 4096))]
    cases += [("prefill", 1, length, length) for length in (512, 2048)]
    for kind, rows, queries, length in cases:
        for head_dim in (64, 128):
            for group in (4, 1):
                if args.only not in ("", kind):
                    continue
                num_q = 16 if head_dim == 64 else 8
                case = Case(lib, rows, queries, length, num_q, num_q // group, head_dim, getattr(torch, args.dtype))
                shape = {"case": kind, "rows": rows, "length": length, "head_dim": head_dim, "group": group}
                line = {"variant": variant.name, "threads": args.threads, "dtype": args.dtype} | shape
                print(json.dumps(line | compare(case, args.seconds)), flush=True)
                case.close()


if __name__ == "__main__":
    main()
