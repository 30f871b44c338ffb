"""How much memory the KV cache may take: a rank's share of its device, less the largest step's activations.

On CUDA the largest step is run and measured. On CPU it is bounded by arithmetic: running it would delay the start by many
seconds on a large model, and resident memory is too coarse a meter (allocators keep what they freed).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from lockstep.config.defaults import MEMORY_SHARE, TokenBytes, default_token_budget, most_num_seqs
from lockstep.config.model_spec import ModelSpec
from lockstep.config.tree import EngineConfig
from lockstep.distributed.groups import ParallelGroups
from lockstep.distributed.partition import head_shard, shard
from lockstep.kernels.product import Product
from lockstep.kernels.reference import sampling
from lockstep.models.decoder import DecoderModel
from lockstep.worker import kv, logprobs, memory
from lockstep.worker.batch import BatchState
from lockstep.worker.model_runner import ModelRunner

LIBRARY_BYTES = 64 << 20  # what maths libraries allocate for themselves in a first large step
SOFTCAP_QUERIES = 128  # queries whose scores the attention backend holds whole when they are capped


@dataclass(frozen=True)
class LargestStep:
    """The numbers that bound a step: tokens in it, rows that sample, tokens in the longest row."""

    tokens: int
    rows: int
    length: int

    @classmethod
    def of(cls, config: EngineConfig, spec: ModelSpec) -> LargestStep:
        budget = default_token_budget(config, spec)
        length = config.model.max_model_len or spec.max_position_embeddings
        return cls(tokens=budget, rows=min(budget, most_num_seqs(config, budget)), length=length)


def room_bytes(config: EngineConfig, device: torch.device, ranks_here: int) -> int:
    """What this rank may still allocate: on CPU its part of the share of available memory, on CUDA the share less what is used."""
    share = config.cache.gpu_memory_utilization or MEMORY_SHARE[device.type]
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        idle = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)  # held by the allocator, free for us
        return int(share * total) - (total - free - idle)
    return int(share * memory.host_available_bytes()) // ranks_here


def largest_step_bytes(model: DecoderModel, spec: ModelSpec, config: EngineConfig, groups: ParallelGroups, device: torch.device) -> int:
    """The most memory one step takes besides weights and KV cache, on this rank. Collective on CUDA."""
    step = LargestStep.of(config, spec)
    extra = sampling_bytes(step, spec) if groups.tp.rank_in_group == 0 else 0
    if device.type == "cuda":
        return measured_bytes(model, spec, config, groups, device) + extra
    if model.native is not None:
        return model.native.nbytes + LIBRARY_BYTES + extra + head_bytes(step, model)
    return forward_bytes(step, spec, groups.tp.world_size, groups.tp.rank_in_group, model.dtype.itemsize) + extra


def head_bytes(step: LargestStep, model: DecoderModel) -> int:
    """Bytes of the packed head's rows and this rank's logits: see `Product`."""
    return Product.bytes(step.rows, *model.head.packed.shape, model.dtype.itemsize) if model.is_last and model.head.packed else 0


def sampling_bytes(step: LargestStep, spec: ModelSpec) -> int:
    """Bytes of choosing tokens: logits as gathered, as joined and in log form, and the sampler's float64 chunk."""
    logits = 3 * 4 * max(step.rows, logprobs.chunk_rows(spec.vocab_size)) * spec.vocab_size
    return logits + 5 * 8 * max(sampling.CHUNK_ELEMENTS, spec.vocab_size)


def forward_bytes(step: LargestStep, spec: ModelSpec, tp: int, rank: int, itemsize: int) -> int:
    """An upper bound of what the forward pass holds at once, by arithmetic.

    per token         see TokenBytes
    masks             tokens x length           additive, of rows with a cached prefix, one set per kind of layer
    gathered KV       2 x length x KV heads     of the row attended to
    capped scores     3 x 128 x length x heads  float32, only with attention soft caps
    """
    heads = head_shard(spec.num_heads, spec.num_kv_heads, tp, rank)
    columns = shard(spec.intermediate_size, tp, rank).size
    q, kv_heads = heads.q.size, heads.kv.size
    stream, attention, mlp = (step.tokens * each for each in TokenBytes.of(spec, q, kv_heads, columns, itemsize))
    masks = len(set(spec.layer_kinds) or {"full"}) * step.tokens * step.length * (itemsize + 1)
    gathered = max(2 * step.length * kv_heads * spec.head_dim * itemsize, 16 << 20)
    scores = 3 * SOFTCAP_QUERIES * step.length * q * 4 if spec.attention_softcap is not None else 0
    return LIBRARY_BYTES + stream + max(attention + masks + gathered + scores, mlp)


def measured_bytes(model: DecoderModel, spec: ModelSpec, config: EngineConfig, groups: ParallelGroups, device: torch.device) -> int:
    """How far memory rises in the largest steps: one long row's last chunk, and the most rows, each as long as can be.

    They run on one KV block that every entry of the block tables names. Collective: all ranks must call it.
    """
    step, block_size = LargestStep.of(config, spec), config.cache.block_size
    meter = memory.PeakMeter(device)
    model.bind_kv(kv.allocate(model.kv_layers(), 1, block_size, dtype=model.dtype, device=device))
    runner = ModelRunner(model, spec, groups, state=BatchState(1, 1, block_size), device=device)
    most = 0
    for queries, lengths in (([min(step.tokens, step.length)], [step.length]), ([1] * step.rows, [step.length] * step.rows)):
        with meter.measure():
            runner.rehearse(queries, lengths)
        most = max(most, meter.extra_bytes)
    return most
