"""Automatic values, decided before memory is profiled (the ranks profile a step of just this size).

Pure functions of the configuration, the model and, where the caller knows it, the memory one rank may use.
"""

from __future__ import annotations

import sys
from typing import NamedTuple, Protocol

from lockstep.config.model_spec import ModelSpec
from lockstep.config.tree import EngineConfig, ParallelConfig

MEMORY_SHARE = {"cpu": 0.5, "cuda": 0.9}  # of free memory on CPU, of the device's memory on CUDA
MIN_BUDGET = 512
MAX_BUDGET = {"cpu": 2048, "cuda": 8192}
MAX_SEQS = 256
ACTIVATION_SHARE = 1 / 16  # of a rank's memory, that the activations of one step may take
_ITEM_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


class Widths(Protocol):
    """What decides how wide a token is; `ModelSpec` has it, and so do the shapes of models that only the planner knows."""

    @property
    def hidden_size(self) -> int: ...
    @property
    def head_dim(self) -> int: ...


class TokenBytes(NamedTuple):
    """What one token of a step holds at once, in bytes on one rank: the residual stream always, then attention or the MLP."""

    stream: int
    attention: int
    mlp: int

    @classmethod
    def of(cls, spec: Widths, heads: int, kv_heads: int, columns: int, itemsize: int) -> TokenBytes:
        """An upper bound, for a rank with so many heads and MLP columns.

        stream      6 x hidden           residual, normed (and its float32 form), layer output, embedding
        attention   3 x heads x width    queries, keys, values; rotated; the result
        MLP         4 x columns          gate and up joined, activated, product
        """
        wide = max(itemsize, 4)
        attention = 3 * (heads + 2 * kv_heads) * spec.head_dim * wide
        return cls(6 * spec.hidden_size * wide, attention, 4 * columns * itemsize)


def activation_bytes_per_token(config: EngineConfig, spec: ModelSpec) -> int:
    """What one token of a step takes besides weights and KV cache, in bytes on the rank with the largest shares."""
    tp = config.parallel.tensor_parallel_size
    heads, kv_heads, columns = (-(-whole // tp) for whole in (spec.num_heads, spec.num_kv_heads, spec.intermediate_size))
    stream, attention, mlp = TokenBytes.of(spec, heads, kv_heads, columns, _ITEM_BYTES.get(config.model.dtype, 4))
    return stream + max(attention, mlp)


class Choice(NamedTuple):
    """An automatic value, and what speaks for it."""

    value: str
    why: str


def choose_backend(
    parallel: ParallelConfig, devices_here: int = sys.maxsize, in_ray_group: bool = False, ray_cluster: bool = False
) -> Choice:
    """distributed_executor_backend as set; else uni (in this process) for one rank and mp (worker processes) for more, or ray for
    more where this program runs in a Ray placement group, or a Ray cluster is known and this host has too few devices."""
    ranks = parallel.ranks_here
    if parallel.distributed_executor_backend is not None:
        return Choice(parallel.distributed_executor_backend, "it is set")
    if parallel.world_size == 1:
        return Choice("uni", "there is one rank")
    one_host = parallel.nnodes == 1 and parallel.data_parallel_backend != "ray"
    if one_host and in_ray_group:
        return Choice("ray", "this program runs in a Ray placement group")
    if one_host and ray_cluster and ranks > devices_here:
        return Choice("ray", f"{ranks} ranks are more than the {devices_here} devices here, and RAY_ADDRESS names a cluster")
    return Choice("mp", f"there are {parallel.world_size} ranks")


def default_backend(parallel: ParallelConfig) -> str:
    """What `choose_backend` says where nothing is known about the machine."""
    return choose_backend(parallel).value


def default_token_budget(config: EngineConfig, spec: ModelSpec, memory_bytes: int | None = None) -> int:
    """max_num_batched_tokens: as set, else 2048 on CPU and 8192 on CUDA, shared out over the pipeline's stages (a prompt
    that is one step leaves all but one of them idle) and halved while a step's activations would take over 1/16 of
    `memory_bytes` (what one rank may use, where known), down to 512.

    Never below max_num_seqs (a token for each running request), nor, without chunked prefill, below max_model_len.
    """
    scheduler = config.scheduler
    if scheduler.max_num_batched_tokens is not None:
        return scheduler.max_num_batched_tokens
    budget = MAX_BUDGET["cuda" if config.runtime.device == "cuda" else "cpu"]
    budget = max(MIN_BUDGET, budget // config.parallel.pipeline_parallel_size)
    if memory_bytes is not None:
        per_token = activation_bytes_per_token(config, spec)
        while budget > MIN_BUDGET and budget * per_token > memory_bytes * ACTIVATION_SHARE:
            budget //= 2
    floor = scheduler.max_num_seqs or 1
    if not scheduler.enable_chunked_prefill:
        floor = max(floor, config.model.max_model_len or spec.max_position_embeddings)
    return max(budget, floor)


def most_num_seqs(config: EngineConfig, budget: int) -> int:
    """max_num_seqs as set, else the most that the engine may choose for it. Ranks size their batch state by this."""
    return config.scheduler.max_num_seqs or min(MAX_SEQS, budget)
