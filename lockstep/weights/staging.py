"""Where weights lie between the file and their packed form: one buffer, used by one module after the other."""

from __future__ import annotations

import mmap
from collections.abc import Sequence

import torch

from lockstep.weights.plan import Task

_ALIGN = 64  # bytes


class Staging:
    """Lends a module the memory of its matrices until they are packed.

    A page of memory is dear the first time it is touched (measured: 0.5 to 2 s a GB, reading the file into it 0.05 s), so
    weights that are only passing through share as little of it as there can be: the largest module's.
    """

    def __init__(self, modules: Sequence[Sequence[Task]]) -> None:
        """`modules`: the tasks of each module that will borrow."""
        size = max((sum(_padded_bytes(param) for param in _matrices(tasks)) for tasks in modules), default=0)
        self._bytes = torch.empty(0, dtype=torch.uint8)
        if size:
            memory = mmap.mmap(-1, size)
            if hasattr(mmap, "MADV_HUGEPAGE"):
                memory.madvise(mmap.MADV_HUGEPAGE)
            self._bytes = torch.frombuffer(memory, dtype=torch.uint8)

    def lend(self, tasks: Sequence[Task]) -> None:
        """Put the matrices that `tasks` fill into the buffer. What it held before is overwritten."""
        used = 0
        for param in _matrices(tasks):
            nbytes = param.numel() * param.element_size()
            param.data = self._bytes[used : used + nbytes].view(param.dtype).view(param.shape)
            used += _padded_bytes(param)


def _matrices(tasks: Sequence[Task]) -> list[torch.Tensor]:
    """Parameters of two dims in host memory that the tasks fill whole: padding that a layer wrote must stay where it is."""
    params = {id(task.param): task.param for task in tasks if task.param.dim() == 2 and task.param.device.type == "cpu"}
    filled = dict.fromkeys(params, 0)
    for task in tasks:
        if id(task.param) in filled:
            filled[id(task.param)] += task.dest.numel()
    return [param for key, param in params.items() if filled[key] == param.numel() > 0]


def _padded_bytes(param: torch.Tensor) -> int:
    return -(-param.numel() * param.element_size() // _ALIGN) * _ALIGN
