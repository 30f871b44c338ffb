"""Ranks, groups and collectives.

Importing this package loads no torch: `topology`, `partition`, `progress` and `message_queue` are used by processes that
have none. The names below are looked up in their modules when first used.
"""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec
from typing import Any

_HOME = {
    "tensor_model_parallel_all_reduce": "collectives",
    "tensor_model_parallel_all_gather": "collectives",
    "tensor_model_parallel_reduce_scatter": "collectives",
    "tensor_model_parallel_gather": "collectives",
    "broadcast_tensor_dict": "collectives",
    "GroupCoordinator": "group",
    "solo_group": "group",
    "ParallelGroups": "groups",
    "Topology": "topology",
    "StatelessProcessGroup": "stateless",
    "stateless_init_torch_distributed_process_group": "stateless",
    "CollectiveMismatchError": "ledger",
    "CollectiveTimeoutError": "ledger",
}


def __getattr__(name: str) -> Any:
    if name.startswith("__") or find_spec(f"{__name__}.{name}"):
        raise AttributeError(name)  # `from lockstep.distributed import group` then imports the submodule
    module = import_module(f"lockstep.distributed.{_HOME.get(name, 'parallel_state')}")
    try:
        return getattr(module, name)
    except AttributeError:
        raise AttributeError(f"module 'lockstep.distributed' has no attribute {name!r}") from None
