"""Names that the ecosystem imports from `parallel_state` and that live in modules of their own."""

from __future__ import annotations

from lockstep.distributed.codec import TensorMetadata
from lockstep.distributed.collectives import (
    broadcast_tensor_dict,
    tensor_model_parallel_all_gather,
    tensor_model_parallel_all_reduce,
    tensor_model_parallel_gather,
    tensor_model_parallel_reduce_scatter,
)
from lockstep.distributed.custom_ops import all_gather, all_reduce, reduce_scatter
from lockstep.distributed.group import _get_unique_name, solo_group
from lockstep.distributed.groups import ParallelGroups
from lockstep.distributed.handles import Handle
from lockstep.distributed.ledger import CollectiveMismatchError, CollectiveTimeoutError
from lockstep.distributed.nodes import in_the_same_node_as
from lockstep.distributed.rendezvous import RendezvousError
from lockstep.distributed.stateless import (
    StatelessProcessGroup,
    stateless_destroy_torch_distributed_process_group,
    stateless_init_torch_distributed_process_group,
)
from lockstep.distributed.tensor_dict import _split_tensor_dict

__all__ = [
    "CollectiveMismatchError",
    "CollectiveTimeoutError",
    "Handle",
    "ParallelGroups",
    "RendezvousError",
    "StatelessProcessGroup",
    "TensorMetadata",
    "_get_unique_name",
    "_split_tensor_dict",
    "all_gather",
    "all_reduce",
    "broadcast_tensor_dict",
    "in_the_same_node_as",
    "reduce_scatter",
    "solo_group",
    "stateless_destroy_torch_distributed_process_group",
    "stateless_init_torch_distributed_process_group",
    "tensor_model_parallel_all_gather",
    "tensor_model_parallel_all_reduce",
    "tensor_model_parallel_gather",
    "tensor_model_parallel_reduce_scatter",
]
