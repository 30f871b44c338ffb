"""Attention in plain torch operations: the reference for every device, and the backend until kernels take its place."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from lockstep.attention.batch import AttentionBatch
from lockstep.attention.layer import Attention
from lockstep.attention.plan import TILE, DecodePlan, PrefillRow, Tile, decode_plan, prefill_plan

# Gathered keys and values of one decode chunk: on a CPU they should still be in cache when they are read back.
WORKSPACE_BYTES = {"cpu": 4 << 20, "cuda": 256 << 20}
SOFTCAP_TILE = 128  # scores of a tile are held whole in float32


class TorchAttention:
    """Gathers the blocks that rows read and calls scaled_dot_product_attention; explicit float32 scores for soft caps."""

    def __init__(self) -> None:
        self._workspace: Tensor | None = None

    def forward(self, layer: Attention, q: Tensor, k: Tensor, v: Tensor, batch: AttentionBatch) -> Tensor:
        _store(layer, k, v, batch)
        decode, prefill = self._plans(layer, q, batch)
        if decode is not None and not prefill:
            return self._decode(layer, q, decode, None)
        out = q.new_empty(q.shape)
        if decode is not None:
            self._decode(layer, q, decode, out)
        for row in prefill:
            mine = slice(row.start, row.stop)
            keys, values = (k[mine], v[mine]) if row.blocks is None else self._gather(layer, row.blocks)
            _prefill(layer, q[mine], keys, values, tiles=row.tiles, out=out[mine])
        return out

    def _plans(self, layer: Attention, q: Tensor, batch: AttentionBatch) -> tuple[DecodePlan | None, list[PrefillRow]]:
        capped, token_bytes = layer.softcap is not None, 2 * layer.num_kv * layer.head_dim * q.element_size()

        def make(b: AttentionBatch) -> tuple[DecodePlan | None, list[PrefillRow]]:
            room = WORKSPACE_BYTES.get(q.device.type, WORKSPACE_BYTES["cpu"])
            return (
                decode_plan(b, layer.window, b.block_size * token_bytes, room, q.dtype),
                prefill_plan(b, layer.window, q.dtype, SOFTCAP_TILE if capped else TILE, not capped),
            )

        return batch.shared((layer.window, capped, token_bytes, q.dtype), make)

    def _decode(self, layer: Attention, q: Tensor, plan: DecodePlan, out: Tensor | None) -> Tensor:
        """The plan's rows of `q [tokens, num_q, D]`, written to their places in `out` (None: a new one)."""
        index = plan.token_index
        grouped = layer.groups.split(q if index is None else q.index_select(0, index))
        parts = []
        for chunk in plan.chunks:
            shape = (chunk.stop - chunk.start, -1, layer.num_kv, layer.head_dim)
            keys, values = (x.view(shape).transpose(1, 2) for x in self._gather(layer, chunk.blocks))
            parts.append(_attend(layer, grouped[chunk.start : chunk.stop], keys, values, mask=chunk.mask))
        result = layer.groups.join(parts[0] if len(parts) == 1 else torch.cat(parts))
        if index is None:
            return result
        return (q.new_empty(q.shape) if out is None else out).index_copy_(0, index, result)

    def _gather(self, layer: Attention, blocks: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of `blocks`, each `[blocks * block_size, num_kv, D]`, valid until the next call."""
        shape = (2, len(blocks), *layer.kv.shape[2:])
        need = 2 * len(blocks) * layer.kv[0, 0].numel()
        space = self._workspace
        if space is None or space.numel() < need or space.dtype != layer.kv.dtype or space.device != layer.kv.device:
            space = self._workspace = torch.empty(need, dtype=layer.kv.dtype, device=layer.kv.device)
        room = space[:need].view(shape)
        torch.index_select(layer.kv[0], 0, blocks, out=room[0])
        torch.index_select(layer.kv[1], 0, blocks, out=room[1])
        return room[0].flatten(0, 1), room[1].flatten(0, 1)


def _store(layer: Attention, k: Tensor, v: Tensor, batch: AttentionBatch) -> None:
    if batch.fresh_blocks is not None:
        # A block begun in this step still holds what its last owner wrote. Gathered whole, a masked NaN there would
        # poison the sum (0 * NaN), so it is cleared once.
        layer.kv.index_fill_(1, batch.fresh_blocks, 0)
    layer.k_slots.index_copy_(0, batch.slot_mapping, k)
    layer.v_slots.index_copy_(0, batch.slot_mapping, v)


def _attend(layer: Attention, q: Tensor, k: Tensor, v: Tensor, *, mask: Tensor | None, causal: bool = False) -> Tensor:
    """`q [B, heads, queries, D]`, `k, v [B, heads, keys, D]` -> `[B, heads, queries, D]`. mask broadcasts, 0 or -inf."""
    if layer.softcap is None:
        if mask is not None:
            mask = mask.expand(q.shape[0], q.shape[1], q.shape[2], k.shape[2])
        return F.scaled_dot_product_attention(q, k, v, mask, is_causal=causal, scale=layer.scale)
    scores = torch.matmul(q.float(), k.float().transpose(2, 3)).mul_(layer.scale / layer.softcap).tanh_().mul_(layer.softcap)
    if mask is not None:
        scores += mask
    return torch.matmul(scores.softmax(-1), v.float()).to(q.dtype)


def _prefill(layer: Attention, q: Tensor, keys: Tensor, values: Tensor, *, tiles: list[Tile], out: Tensor) -> None:
    """`q [queries, num_q, D]` over `keys, values [keys, num_kv, D]` into `out [queries, num_q, D]`."""
    # Group members become the batch, over which keys and values are expanded: nothing is repeated in memory.
    grouped = layer.groups.split(q).permute(2, 1, 0, 3)
    keys, values = (x.transpose(0, 1).expand(layer.groups.width, -1, -1, -1) for x in (keys, values))
    for tile in tiles:
        seen = slice(tile.k0, tile.k1)
        result = _attend(layer, grouped[:, :, tile.q0 : tile.q1], keys[:, :, seen], values[:, :, seen], mask=tile.mask, causal=tile.causal)
        out[tile.q0 : tile.q1] = layer.groups.join(result.permute(2, 1, 0, 3))
