"""Automatic numbers of a step, decided before memory is profiled (the ranks profile a step of just this size).

Pure functions of the configuration, the model and, where the caller knows it, the memory one rank may use.
"""

from __future__ import annotations

from lockstep.config.model_spec import ModelSpec
from lockstep.config.tree import EngineConfig

MIN_BUDGET = 512
MAX_BUDGET = {"cpu": 2048, "cuda": 8192}
MAX_SEQS = 256
ACTIVATION_SHARE = 1 / 16  # of a rank's memory, that the activations of one step may take
_ITEM_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


def activation_bytes_per_token(config: EngineConfig, spec: ModelSpec) -> int:
    """An estimate of what one token of a step takes besides weights and KV cache, in bytes on one rank.

    Four residual-sized tensors, queries/keys/values with their rotated copies, gate, up and their product live at once.
    """
    tp = config.parallel.tensor_parallel_size
    heads = -(-spec.num_heads // tp) + 2 * -(-spec.num_kv_heads // tp)
    elements = 4 * spec.hidden_size + 2 * heads * spec.head_dim + 3 * -(-spec.intermediate_size // tp)
    return elements * _ITEM_BYTES.get(config.model.dtype, 4)


def default_token_budget(config: EngineConfig, spec: ModelSpec, memory_bytes: int | None = None) -> int:
    """max_num_batched_tokens: as set, else 2048 on CPU and 8192 on CUDA, halved down to 512 while a step's activations
    would take over 1/16 of `memory_bytes` (what one rank may use, where known).

    Never below max_num_seqs (a token for each running request), nor, without chunked prefill, below max_model_len.
    """
    scheduler = config.scheduler
    if scheduler.max_num_batched_tokens is not None:
        return scheduler.max_num_batched_tokens
    budget = MAX_BUDGET["cuda" if config.runtime.device == "cuda" else "cpu"]
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
