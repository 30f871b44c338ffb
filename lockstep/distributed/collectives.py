"""The tensor-parallel collectives by name, on the process-wide groups."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist
from torch import Tensor


def _tp() -> Any:
    # Looked up at the call: parallel_state re-exports this module's names and imports it first.
    from lockstep.distributed.parallel_state import get_tp_group

    return get_tp_group()


def tensor_model_parallel_all_reduce(input_: Tensor) -> Tensor:
    """The sum over the TP group, as a new tensor."""
    out: Tensor = _tp().all_reduce(input_)
    return out


def tensor_model_parallel_all_gather(input_: Tensor, dim: int = -1) -> Tensor:
    """Every TP rank's tensor joined along `dim`."""
    out: Tensor = _tp().all_gather(input_, dim)
    return out


def tensor_model_parallel_reduce_scatter(input_: Tensor, dim: int = -1) -> Tensor:
    """This TP rank's slice along `dim` of the sum."""
    out: Tensor = _tp().reduce_scatter(input_, dim)
    return out


def tensor_model_parallel_gather(input_: Tensor, dst: int = 0, dim: int = -1) -> Tensor | None:
    """Every TP rank's tensor joined along `dim` on TP rank `dst`; None elsewhere."""
    out: Tensor | None = _tp().gather(input_, dst, dim)
    return out


def broadcast_tensor_dict(tensor_dict: dict[Any, Any] | None = None, src: int = 0) -> dict[Any, Any] | None:
    """TP rank `src`'s dict on every TP rank; the dict itself when torch.distributed is not initialised."""
    if not dist.is_initialized():
        return tensor_dict
    out: dict[Any, Any] | None = _tp().broadcast_tensor_dict(tensor_dict, src)
    return out
