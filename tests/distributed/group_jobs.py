"""Functions that the group tests run on ranks."""

from __future__ import annotations

from typing import Any

import torch

from lockstep.distributed import parallel_state as ps


def tp_group(world_size: int) -> Any:
    ps.initialize_model_parallel(tensor_model_parallel_size=world_size)
    return ps.get_tp_group()


def hello(rank: int, world_size: int, word: str) -> tuple[Any, ...]:
    tp = tp_group(world_size)
    x = torch.full((2, 3), float(rank + 1))
    y = tp.all_reduce(x)
    return rank, word, y, bool((x == rank + 1).all())
