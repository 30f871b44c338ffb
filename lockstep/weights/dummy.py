"""Synthetic weights (`--load-format dummy`): seeded, and the same model for any split.

Every element is a hash of (seed, checkpoint tensor name, row, column), so a rank computes its slice and nothing else,
and the result does not depend on the TP size, the device or the number of threads.
"""

from __future__ import annotations

import hashlib
import time

import torch
from torch import Tensor, nn

from lockstep.weights.loader import LoadReport, Progress
from lockstep.weights.plan import LoadableModel, Task, plan_tasks

_STD = 0.02  # the usual initializer_range
_CHUNK_ELEMENTS = 1 << 18  # the working set stays in cache


def fill_dummy(model: LoadableModel, seed: int = 0, *, progress: Progress | None = None) -> LoadReport:
    """Fill every parameter: matrices uniform with standard deviation 0.02, biases likewise, norms with what scales by 1.

    `progress` is called after each tensor. The report's bytes are 0: nothing is read.
    """
    started = time.monotonic()
    tasks = plan_tasks(model)
    total = sum(task.dest.numel() * task.param.element_size() for task in tasks)
    done = 0
    with torch.no_grad():
        for task in tasks:
            _fill(task, model, seed)
            done += task.dest.numel() * task.param.element_size()
            if progress is not None:
                progress(done, total, task.name)
    return LoadReport(bytes_read=0, header_bytes=0, checkpoint_bytes=0, tensors=len(tasks), files=0, seconds=time.monotonic() - started)


def _fill(task: Task, model: LoadableModel, seed: int) -> None:
    module: nn.Module = model.get_submodule(task.target.rpartition(".")[0])
    if task.param.dim() == 1 and task.target.endswith(".weight"):
        task.dest.fill_(0.0 if getattr(module, "plus_one", False) else 1.0)
        return
    digest = hashlib.blake2b(f"{seed}\0{task.name}".encode(), digest_size=4).digest()
    dest = task.dest if task.dest.dim() == 2 else task.dest.unsqueeze(0)
    starts = [0, 0]
    starts[task.piece.dim if task.param.dim() == 2 else 1] = task.piece.src_start
    columns = torch.arange(starts[1], starts[1] + dest.shape[1], device=dest.device)
    step = max(1, _CHUNK_ELEMENTS // max(1, dest.shape[1]))
    for first in range(0, dest.shape[0], step):
        part = dest[first : first + step]
        rows = torch.arange(starts[0] + first, starts[0] + first + part.shape[0], device=dest.device)
        part.copy_(_uniform(rows, columns, int.from_bytes(digest, "little")))


def _uniform(rows: Tensor, columns: Tensor, key: int) -> Tensor:
    """Values in +-sqrt(3) * std for each (row, column), `[rows, columns]` float32."""
    mixed = _mix(_mix(rows + key).unsqueeze(1) ^ (columns * 0x9E3779B1 & 0xFFFFFFFF))
    # 24 bits are exact in float32, so every device gets the same value.
    return ((mixed >> 8).float() - float(1 << 23)) * (_STD * 3**0.5 / (1 << 23))


def _mix(x: Tensor) -> Tensor:
    """A bijective mix of the low 32 bits (the finaliser of MurmurHash3, public domain)."""
    x = x & 0xFFFFFFFF
    x = ((x ^ (x >> 16)) * 0x85EBCA6B) & 0xFFFFFFFF
    x = ((x ^ (x >> 13)) * 0xC2B2AE35) & 0xFFFFFFFF
    return x ^ (x >> 16)
