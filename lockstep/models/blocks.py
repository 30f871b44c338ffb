"""The parts of a decoder layer. Column-parallel layers feed row-parallel ones: two all-reduces a layer, no other talk."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from lockstep.attention.batch import AttentionBatch
from lockstep.attention.layer import Attention, AttentionBackend
from lockstep.config.model_spec import ModelSpec
from lockstep.layers.activation import gated_activation
from lockstep.layers.base import Place
from lockstep.layers.linear import LinearBase, MergedColumnParallelLinear, RowParallelLinear
from lockstep.layers.norm import RMSNorm
from lockstep.layers.qkv import QKVParallelLinear
from lockstep.layers.rotary import apply_rotary

if TYPE_CHECKING:
    from lockstep.distributed.group import GroupCoordinator


@dataclass(frozen=True)
class Build:
    """What every part of one model is built from."""

    spec: ModelSpec
    tp: GroupCoordinator
    dtype: torch.dtype
    device: torch.device
    backend: AttentionBackend

    def place(self, prefix: str) -> Place:
        return {"tp": self.tp, "dtype": self.dtype, "device": self.device, "prefix": prefix}

    def norm(self, size: int | None = None) -> RMSNorm:
        spec = self.spec
        return RMSNorm(size or spec.hidden_size, spec.rms_norm_eps, plus_one=spec.norm_plus_one, dtype=self.dtype, device=self.device)


@dataclass(frozen=True)
class Step:
    """What all layers of one step share. cos, sin: `[tokens, 1, head_dim / 2]`, of full and of sliding layers."""

    batch: AttentionBatch
    full: tuple[Tensor, Tensor]
    sliding: tuple[Tensor, Tensor]


class SelfAttention(nn.Module):
    """QKV projection, rotary embedding, attention over the paged cache, output projection (one all-reduce)."""

    def __init__(self, build: Build, index: int, prefix: str) -> None:
        super().__init__()
        spec = build.spec
        self.qkv_proj = QKVParallelLinear(
            spec.hidden_size,
            spec.head_dim,
            spec.num_heads,
            spec.num_kv_heads,
            bias=spec.attention_bias,
            return_bias=False,
            **build.place(f"{prefix}.qkv_proj"),
        )
        self.o_proj = RowParallelLinear(
            spec.num_heads * spec.head_dim,
            spec.hidden_size,
            bias=spec.attention_out_bias,
            return_bias=False,
            units=spec.num_heads,
            **build.place(f"{prefix}.o_proj"),
        )
        qkv = self.qkv_proj
        self.sliding = spec.layer_kinds[index] == "sliding"
        self.attention = Attention(
            qkv.num_heads,
            qkv.kv_of_q,
            qkv.num_kv_heads,
            spec.head_dim,
            scale=spec.scale,
            window=spec.sliding_window if self.sliding else None,
            softcap=spec.attention_softcap,
            backend=build.backend,
            device=build.device,
        )
        self._heads = (qkv.num_heads, qkv.num_kv_heads)
        self._head_dim = spec.head_dim

    def forward(self, hidden: Tensor, step: Step) -> Tensor:
        """`[tokens, hidden] -> [tokens, hidden]`."""
        num_q, num_kv = self._heads
        qkv = self.qkv_proj(hidden).view(hidden.shape[0], num_q + 2 * num_kv, self._head_dim)
        q, k = self.rotated(qkv[:, : num_q + num_kv], *(step.sliding if self.sliding else step.full))
        out: Tensor = self.o_proj(self.attention(q, k, qkv[:, num_q + num_kv :], step.batch))
        return out

    def rotated(self, qk: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        """Position the query and key heads `[tokens, q + k heads, head_dim]`; returns q and k."""
        qk = apply_rotary(qk, cos, sin)
        return qk[:, : self._heads[0]], qk[:, self._heads[0] :]


class NormedSelfAttention(SelfAttention):
    """Query and key heads are normed, each by itself, before they are rotated (Qwen-3, Gemma-3)."""

    def __init__(self, build: Build, index: int, prefix: str) -> None:
        super().__init__(build, index, prefix)
        self.q_norm, self.k_norm = build.norm(build.spec.head_dim), build.norm(build.spec.head_dim)

    def rotated(self, qk: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        q, k = qk[:, : self._heads[0]], qk[:, self._heads[0] :]
        return apply_rotary(self.q_norm(q), cos, sin), apply_rotary(self.k_norm(k), cos, sin)


class GatedMLP(nn.Module):
    """`down(act(gate(x)) * up(x))` (one all-reduce)."""

    def __init__(self, build: Build, prefix: str) -> None:
        super().__init__()
        spec = build.spec
        self.gate_up_proj = MergedColumnParallelLinear(
            spec.hidden_size,
            [spec.intermediate_size] * 2,
            bias=spec.mlp_bias,
            return_bias=False,
            **build.place(f"{prefix}.gate_up_proj"),
        )
        self.down_proj = RowParallelLinear(
            spec.intermediate_size, spec.hidden_size, bias=spec.mlp_bias, return_bias=False, **build.place(f"{prefix}.down_proj")
        )
        self.activation = gated_activation(spec.hidden_act)

    def forward(self, hidden: Tensor) -> Tensor:
        """`[tokens, hidden] -> [tokens, hidden]`."""
        out: Tensor = self.down_proj(self.activation(self.gate_up_proj(hidden)))
        return out


class DecoderLayer(nn.Module):
    """Norm, attention, norm, MLP around a residual stream. Takes and returns (what to add to the stream, the stream)."""

    def __init__(self, build: Build, index: int, prefix: str) -> None:
        super().__init__()
        attention = NormedSelfAttention if build.spec.qk_norm else SelfAttention
        self.self_attn = attention(build, index, f"{prefix}.self_attn")
        self.mlp = GatedMLP(build, f"{prefix}.mlp")
        self.input_layernorm, self.post_attention_layernorm = build.norm(), build.norm()

    def products(self) -> tuple[LinearBase, ...]:
        """The layer's linear layers, in the order of computation."""
        return self.self_attn.qkv_proj, self.self_attn.o_proj, self.mlp.gate_up_proj, self.mlp.down_proj

    def enter(self, hidden: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor]:
        """The layer's normed input and the residual stream; the first layer begins the stream."""
        return (self.input_layernorm(hidden), hidden) if residual is None else self.input_layernorm(hidden, residual)

    def forward(self, hidden: Tensor, residual: Tensor | None, step: Step) -> tuple[Tensor, Tensor]:
        hidden, residual = self.enter(hidden, residual)
        hidden = self.self_attn(hidden, step)
        hidden, residual = self.post_attention_layernorm(hidden, residual)
        return self.mlp(hidden), residual


class SandwichLayer(DecoderLayer):
    """Attention and MLP are normed on their way out too (Gemma-2, Gemma-3)."""

    def __init__(self, build: Build, index: int, prefix: str) -> None:
        super().__init__(build, index, prefix)
        self.pre_feedforward_layernorm, self.post_feedforward_layernorm = build.norm(), build.norm()

    def forward(self, hidden: Tensor, residual: Tensor | None, step: Step) -> tuple[Tensor, Tensor]:
        hidden, residual = self.enter(hidden, residual)
        hidden = self.post_attention_layernorm(self.self_attn(hidden, step))
        hidden, residual = self.pre_feedforward_layernorm(hidden, residual)
        return self.post_feedforward_layernorm(self.mlp(hidden)), residual
