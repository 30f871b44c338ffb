"""How many KV blocks there are, exactly: from what each rank found free after loading.

1. A rank can hold floor(free_bytes / kv_bytes_per_block) blocks, its free bytes being what it measured, or
   kv_cache_memory_bytes where that is set.
2. All ranks hold the same number of blocks: the least that any of them can. num_gpu_blocks_override replaces it.
3. Never more than max_num_seqs requests of max_model_len tokens could use.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from lockstep.config.defaults import default_token_budget, most_num_seqs
from lockstep.config.errors import ConfigError
from lockstep.config.model_spec import ModelSpec
from lockstep.config.tree import EngineConfig
from lockstep.executor.contract import RankMemory
from lockstep.observability.logging import get_logger
from lockstep.utils.sizes import size

log = get_logger(__name__)
TYPICAL_TOKENS = 512  # of one request; only used to choose max_num_seqs when it is not set


@dataclass(frozen=True)
class MemoryPlan:
    """What the KV cache is, on every rank alike but for the bytes."""

    num_blocks: int
    block_size: int  # tokens
    max_num_seqs: int
    max_num_batched_tokens: int
    max_model_len: int
    ranks: tuple[RankMemory, ...]
    limited_by: str  # what the number of blocks came from, in words

    @property
    def kv_tokens(self) -> int:
        """Tokens whose keys and values fit."""
        return self.num_blocks * self.block_size

    @property
    def full_requests(self) -> float:
        """How many requests of max_model_len tokens fit at once."""
        return self.kv_tokens / self.max_model_len

    def kv_bytes(self, rank: RankMemory) -> int:
        """Bytes that the KV cache takes on a rank."""
        return self.num_blocks * rank.kv_bytes_per_block

    def describe(self) -> str:
        """All of it as text, one line per rank. Sizes are exact, in bytes."""
        lines = [
            f"KV cache: {self.num_blocks:,} blocks of {self.block_size} tokens = {self.kv_tokens:,} tokens "
            f"({self.full_requests:.1f} requests of {self.max_model_len:,} tokens), limited by {self.limited_by}",
            f"Each step: at most {self.max_num_seqs:,} requests and {self.max_num_batched_tokens:,} tokens",
        ]
        for rank in self.ranks:
            lines.append(
                f"rank {rank.rank}: weights {_size(rank.weight_bytes)}, KV cache {_size(self.kv_bytes(rank))} "
                f"({self.num_blocks:,} x {rank.kv_bytes_per_block:,} B), free for it {_size(rank.free_bytes)}"
            )
        if self.kv_tokens < self.max_model_len:
            lines.append(f"A request ends at {self.kv_tokens:,} tokens: the cache holds no more (num_gpu_blocks_override).")
        return "\n".join(lines)


def plan_memory(config: EngineConfig, spec: ModelSpec, ranks: Sequence[RankMemory]) -> MemoryPlan:
    """Size the KV cache. Raises ConfigError when not even one request of max_model_len tokens fits in the memory found.

    An explicit num_gpu_blocks_override is taken at its word: below max_model_len it shortens requests instead.
    """
    cache, block_size = config.cache, config.cache.block_size
    model_len = config.model.max_model_len or spec.max_position_embeddings
    budget = default_token_budget(config, spec)
    per_request = -(-model_len // block_size)
    most = most_num_seqs(config, budget)
    if cache.num_gpu_blocks_override is not None:
        blocks, reason = cache.num_gpu_blocks_override, f"num_gpu_blocks_override={cache.num_gpu_blocks_override}"
        if blocks < 1:
            raise ConfigError(f"num_gpu_blocks_override={blocks}: the cache needs at least 1 block.")
    else:
        blocks, reason = _blocks_in_memory(config, ranks, per_request, model_len, most)
    fitting = max(1, blocks * block_size // min(model_len, TYPICAL_TOKENS))
    seqs = config.scheduler.max_num_seqs or min(most, fitting)
    if cache.num_gpu_blocks_override is None and blocks > seqs * per_request:
        if cache.kv_cache_memory_bytes is not None:
            _warn_of_unused(cache.kv_cache_memory_bytes, seqs * per_request * max(r.kv_bytes_per_block for r in ranks), seqs, model_len)
        blocks, reason = seqs * per_request, f"max_num_seqs={seqs} x max_model_len={model_len}, which can use no more"
    return MemoryPlan(blocks, block_size, seqs, budget, model_len, tuple(ranks), reason)


def _warn_of_unused(given: int, used: int, seqs: int, model_len: int) -> None:
    log.warning(
        "kv_cache_memory_bytes=%d (%s): only %s are taken, because max_num_seqs=%d requests of max_model_len=%d tokens can use no more; "
        "raise one of these, or leave kv_cache_memory_bytes out.",
        *(given, size(given), size(used), seqs, model_len),
    )


def _blocks_in_memory(
    config: EngineConfig, ranks: Sequence[RankMemory], per_request: int, model_len: int, most_seqs: int
) -> tuple[int, str]:
    """(blocks that every rank can hold, which rank's memory said so)."""
    holders = [rank for rank in ranks if rank.kv_bytes_per_block > 0]
    if not holders:
        return most_seqs * per_request, "nothing: no rank keeps a KV cache"
    given = config.cache.kv_cache_memory_bytes
    free, rank = min(((rank.free_bytes if given is None else given, rank) for rank in holders), key=_blocks_of)
    blocks = _blocks_of((free, rank))
    source = "the memory free" if given is None else f"kv_cache_memory_bytes={given}"
    if blocks < per_request:
        needed, fits = per_request * rank.kv_bytes_per_block, blocks * config.cache.block_size
        remedy = f"set max_model_len to at most {fits}" if fits > 1 else "free memory or use more ranks"
        raise ConfigError(
            f"max_model_len={model_len} does not fit: one request of that length needs {per_request} KV blocks = {needed:,} bytes on "
            f"rank {rank.rank}, and {source} leaves {free:,} bytes, {blocks} blocks ({needed - free:,} bytes are missing): {remedy}, "
            f"or raise gpu_memory_utilization or kv_cache_memory_bytes."
        )
    return blocks, f"{source} on rank {rank.rank}"


def _blocks_of(memory: tuple[int, RankMemory]) -> int:
    """Blocks that fit in (free bytes, of this rank)."""
    return max(0, memory[0]) // memory[1].kv_bytes_per_block


def _size(num_bytes: int) -> str:
    """A size for people, and exact."""
    return f"{num_bytes / 2**20:,.1f} MiB ({num_bytes:,} B)"
