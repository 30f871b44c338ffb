"""The query, key and value projection, cut by attention heads."""

from __future__ import annotations

from typing import Unpack

import torch
from torch import Tensor

from lockstep.distributed.partition import HeadShard, Shard, head_shard
from lockstep.layers.base import Piece, Place, ShardId
from lockstep.layers.linear import ColumnParallelLinear, LinearBase


class QKVParallelLinear(ColumnParallelLinear):
    """Q, K and V in one product, `[tokens, hidden] -> [tokens, (q heads + k heads + v heads) of this rank]`.

    Query heads are cut over the ranks; each rank also holds every KV head that its query heads read, so KV heads are
    replicated where TP exceeds them or a cut falls inside a group. Any TP up to the number of query heads works.
    Shard ids are "q", "k" and "v". Raises ConfigError (a ValueError) when TP exceeds the query heads.
    """

    def __init__(
        self,
        hidden_size: int,
        head_size: int,
        total_num_heads: int,
        total_num_kv_heads: int | None = None,
        *,
        bias: bool = True,
        skip_bias_add: bool = False,
        return_bias: bool = True,
        v_head_size: int | None = None,
        **place: Unpack[Place],
    ) -> None:
        kv_heads = total_num_heads if total_num_kv_heads is None else total_num_kv_heads
        v_size = head_size if v_head_size is None else v_head_size
        full = total_num_heads * head_size + kv_heads * (head_size + v_size)
        LinearBase.__init__(self, hidden_size, full, bias, skip_bias_add, return_bias, **place)
        self.gather_output = False
        self.head_size, self.v_head_size = head_size, v_size
        self.total_num_heads, self.total_num_kv_heads = total_num_heads, kv_heads
        self.heads: HeadShard = head_shard(total_num_heads, kv_heads, self.tp_size, self.tp_rank)
        self.num_heads = self.heads.q.size
        self.num_kv_heads = self.heads.kv.size
        self.kv_of_q = self.heads.kv_of_q
        self.sizes = [self.num_heads * head_size, self.num_kv_heads * head_size, self.num_kv_heads * v_size]
        self.q_size, self.kv_size = self.sizes[0], self.sizes[1]
        self._allocate(sum(self.sizes), hidden_size)

    def shard_ids(self, param: str) -> tuple[ShardId, ...]:
        return ("q", "k", "v")

    def pieces(self, param: str, shard_id: ShardId = None) -> Piece:
        self._check_shard_id(param, shard_id)
        index = ("q", "k", "v").index(str(shard_id))
        heads: Shard = self.heads.q if index == 0 else self.heads.kv
        total = self.total_num_heads if index == 0 else self.total_num_kv_heads
        width = self.v_head_size if index == 2 else self.head_size
        return self._rows(param, sum(self.sizes[:index]), heads.scaled(width), total * width)

    def split(self, qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Views of a result's q, k and v columns: `[tokens, sizes[0] | sizes[1] | sizes[2]]`."""
        q, k, v = torch.split(qkv, self.sizes, dim=-1)
        return q, k, v
