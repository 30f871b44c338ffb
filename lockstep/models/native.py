"""A decoder's layers as one list of C++ operations (CPU): what `DecoderModel.forward` runs once its weights are packed.

A layer is six operations; each reads the buffer that the one before wrote:

    qkv         normed -> qkv            packed product
    rope        qkv -> qkv, KV cache     head norms, rotation, keys and values stored
    attention   qkv, KV cache -> heads
    out         heads -> stream, normed  packed product, partial sums combined over ranks, residual, next norm
    gate_up     normed -> inner          packed product and activation
    down        inner -> stream, normed  as out

After the attention of the model's last layer only the tokens whose hidden states are asked for go on: most of a prompt's are
not, and their rows change no other's.

The modules of `models.blocks` stay the description of the model (and its plain-torch form); this file only reads them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from lockstep.attention.batch import I64, AttentionBatch
from lockstep.distributed.reduction_tree import ReductionTree
from lockstep.kernels.library import DTYPE_CODES, library
from lockstep.kernels.program import Program, StepArgs
from lockstep.layers.activation import activation_code
from lockstep.layers.linear import RowParallelLinear
from lockstep.layers.norm import RMSNorm
from lockstep.layers.rotary import RotaryEmbedding
from lockstep.models.blocks import DecoderLayer, SandwichLayer

if TYPE_CHECKING:
    from lockstep.models.decoder import DecoderModel, Intermediate, LayerWatcher

KV_CHUNK = 16  # tokens; a KV block is a whole number of the chunks in which attention sums
SLOT_BYTES = 4 << 20  # partial sums of one rank's turn, where there is no shared memory to put them in


def why_not(device: torch.device, block_size: int) -> str:
    """Why a model on `device` runs plain torch operations instead; empty when it can run the kernels."""
    if device.type != "cpu":
        return f"the kernels are for CPUs, not {device.type}"
    if block_size % KV_CHUNK:
        return f"block_size={block_size} is not a multiple of {KV_CHUNK}"
    return "" if library() is not None else "the kernel library is not available"


@dataclass
class Buffers:
    """Activations of one step, `[max_tokens, width]` each; rows beyond the step's tokens are not read."""

    stream: Tensor
    normed: Tensor
    qkv: Tensor
    heads: Tensor
    inner: Tensor
    sums: Tensor | None  # [subtrees, tokens, hidden] float32, where Python combines

    @property
    def nbytes(self) -> int:
        tensors = (self.stream, self.normed, self.qkv, self.heads, self.inner, self.sums)
        return sum(t.nbytes for t in tensors if t is not None)


class LocalGroup:
    """A group of one rank, for operations that sum over ranks."""

    def __init__(self, lib: Any) -> None:
        self._lib = lib
        self.handle: int = lib.local_group_new(SLOT_BYTES)

    def __del__(self) -> None:
        self._lib.local_group_free(self.handle)


class NativeDecoder:
    """The packed form of one rank's layers. Construct it once the weights are loaded: what is not packed yet is, and let go.

    max_tokens: most tokens of a step. quantization: None or "int8". Collective where quantised: scales are agreed on.
    """

    def __init__(self, model: DecoderModel, max_tokens: int, quantization: str | None = None) -> None:
        self.lib: Any = library()
        assert self.lib is not None, "no kernel library: ask why_not() first"
        self.model, self.max_tokens = model, max_tokens
        self.code = DTYPE_CODES[str(model.dtype).removeprefix("torch.")]
        for pack in model.packers(quantization).values():
            pack()
        self.group = self._shared_memory()
        self.local = LocalGroup(self.lib) if model.groups.tp.world_size == 1 else None
        self.buffers = self._buffers()
        self.program: Program | None = None
        self.tables: list[Tensor] = []  # of the program: rotations of a step's tokens
        self._timed = False
        self._caches: Sequence[Tensor] = ()
        self.step = StepArgs(self.lib)

    @property
    def narrows(self) -> bool:
        """Whether its last layer computes only what is asked for. Who watches layers sees all of every one."""
        return self.model.is_last and self.model.watcher is None

    def _shared_memory(self) -> int:
        """The library's handle of the TP group's shared memory; 0 where the group has none."""
        return int(getattr(self.model.groups.tp.communicator, "native_handle", 0) or 0)

    def _buffers(self) -> Buffers:
        spec, attention = self.model.spec, self.model.stack[0].self_attn
        qkv, heads = attention.qkv_proj, attention.qkv_proj.num_heads * spec.head_dim

        def empty(width: int) -> Tensor:
            return torch.empty((self.max_tokens, width), dtype=self.model.dtype)

        sums = None
        if not self.group and self.local is None:
            trees = [row.tree for layer in self.model.stack for row in (layer.self_attn.o_proj, layer.mlp.down_proj)]
            most = max(tree.counts[self.model.groups.tp.rank_in_group] for tree in trees)
            sums = torch.empty((max(most, 1), self.max_tokens, spec.hidden_size))
        return Buffers(
            stream=empty(spec.hidden_size),
            normed=empty(spec.hidden_size),
            qkv=empty(sum(qkv.sizes)),
            heads=empty(heads),
            inner=empty(self.model.stack[0].mlp.down_proj.shard.size),
            sums=sums,
        )

    @property
    def nbytes(self) -> int:
        """What a step of any size may take, besides weights and KV cache."""
        tables = 2 * self.max_tokens * self.model.rope.rotary_dim * 4
        return self.buffers.nbytes + tables + SLOT_BYTES * 2 * self.model.groups.tp.world_size

    @property
    def held_bytes(self) -> int:
        """What it has allocated besides weights and KV cache."""
        return self.buffers.nbytes + sum(t.nbytes for t in self.tables) + (SLOT_BYTES if self.local is not None else 0)

    def bind_kv(self, caches: Sequence[Tensor]) -> None:
        """Build the program over these KV caches, one per layer."""
        self._caches = caches
        self.rebuild()

    def rebuild(self) -> None:
        """Build the program anew, after something that it depends on has changed."""
        self.tables.clear()
        self.program = Builder(self, self._caches).build()
        self.program.timed(self._timed)

    def time_operations(self, on: bool) -> None:
        """Note, from the next step on, when each operation begins and ends."""
        assert self.program is not None, "bind_kv comes first"
        self._timed = on
        self.program.timed(on)

    def operation_times(self) -> list[tuple[str, float, float]]:
        """(name, began, ended) of each operation of the last step, seconds of time.monotonic()."""
        assert self.program is not None, "bind_kv comes first"
        return self.program.times()

    def clocks(self) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
        """(began, ended) of all its operations, for who adds up: see `Program.clocks`."""
        assert self.program is not None, "bind_kv comes first"
        return self.program.clocks()

    def forward(
        self, input_ids: Tensor, batch: AttentionBatch, intermediate: Intermediate | None, wanted: I64 | None = None
    ) -> Tensor | Intermediate:
        """As DecoderModel.forward. The result is a view that the next step overwrites."""
        assert self.program is not None, "bind_kv comes first"
        tokens = batch.num_tokens
        assert tokens <= self.max_tokens, f"a step of {tokens} tokens, planned for {self.max_tokens}"
        if intermediate is not None:
            self.buffers.stream[:tokens] = intermediate["hidden_states"]
        self.step.set(
            ids=input_ids if intermediate is None else None,
            query_lens=batch.query_lens,
            seq_lens=batch.seq_lens,
            block_tables=batch.given_tables,
            block_size=batch.block_size,
            wanted=wanted if self.narrows else None,
        )
        self.model.groups.tp.announce("layers", self.buffers.stream[:tokens])
        self.program.run(self.step)
        if self.model.is_last:
            return self.buffers.normed[: self.step.wanted]
        return {"hidden_states": self.buffers.stream[:tokens].clone()}


class Builder:
    """Writes the operations of one program."""

    def __init__(self, native: NativeDecoder, caches: Sequence[Tensor]) -> None:
        self.native, self.model, self.lib, self.code = native, native.model, native.lib, native.code
        self.buffers, self.caches = native.buffers, caches
        self.program = Program(self.lib)
        self.program.keep(native.buffers, list(caches), native.local, native.model.groups.tp.communicator)

    def build(self) -> Program:
        model, stack = self.model, self.model.stack
        ropes = {False: self._angles("full", model.rope)}
        ropes[True] = ropes[False] if model.rope_local is None else self._angles("sliding", model.rope_local)
        if model.is_first:
            self._embed()
        self._norm(f"layers.{model.start}.norm", stack[0].input_layernorm)
        for index, (layer, cache) in enumerate(zip(stack, self.caches, strict=True)):
            last = index + 1 == len(stack)
            following = stack[index + 1].input_layernorm if not last else (model.norm if model.is_last else None)
            rope, narrow = ropes[layer.self_attn.sliding], last and self.native.narrows
            self._layer(f"layers.{model.start + index}", layer, cache, rope, following, narrow)
            if model.watcher is not None:
                self._watch(model.start + index, model.watcher)
        return self.program

    def _watch(self, index: int, watcher: LayerWatcher) -> None:
        self.program.add_stop(f"layers.{index}.watch", lambda tokens: watcher(index, self.buffers.stream[:tokens]))

    def _array(self, values: Sequence[int], dtype: type = np.int32) -> int:
        """The address of `values`, kept with the program."""
        array = np.array(values, dtype)
        self.program.keep(array)
        return array.ctypes.data

    def _angles(self, kind: str, rope: RotaryEmbedding) -> tuple[Tensor, int]:
        half = rope.rotary_dim // 2
        table = torch.empty((self.native.max_tokens, 2 * half))
        self.native.tables.append(table)
        self.program.keep(table, rope.inv_freq)
        self.program.add(f"angles.{kind}", self.lib.op_angles(rope.inv_freq.data_ptr(), half, table.data_ptr()))
        return table, half

    def _embed(self) -> None:
        model, embedding, stream = self.model, self.model.embed_tokens, self.buffers.stream
        tp = model.groups.tp
        bounds = [cut.start for cut in embedding.cuts] + [embedding.cuts[-1].stop]
        packed = embedding.packed.handle if embedding.packed is not None else 0
        op = self.lib.op_embed(
            None if packed else embedding.weight.data_ptr(),
            packed,
            self._array(bounds, np.int64),
            embedding.tp_size,
            embedding.tp_rank,
            model.spec.hidden_size,
            stream.data_ptr(),
            self.code,
            model.embedding_scale,
            self.native.group,
            len(self.program.names),
        )
        self.program.add("embed", op)
        if tp.world_size > 1 and not self.native.group:
            self.program.add_stop("embed.all_reduce", lambda tokens: tp.all_reduce_(stream[:tokens]))

    def _norm(self, name: str, norm: RMSNorm) -> None:
        b, width = self.buffers, norm.weight.shape[0]
        args = (b.stream.data_ptr(), width, norm.weight.data_ptr(), b.normed.data_ptr(), width, width)
        self.program.add(name, self.lib.op_norm(*args, norm.eps, norm.plus_one, self.code))

    def _layer(
        self, name: str, layer: DecoderLayer, cache: Tensor, angles: tuple[Tensor, int], following: RMSNorm | None, narrow: bool
    ) -> None:
        """`following`: the norm that the next layer, or the model's end, begins with. narrow: what is not wanted ends here."""
        self._attention(name, layer, cache, angles)
        if narrow:
            self.program.narrow(f"{name}.narrow", self.buffers.stream, self.buffers.heads)
        b, mlp, sandwich = self.buffers, layer.mlp, isinstance(layer, SandwichLayer)
        before_mlp = layer.pre_feedforward_layernorm if sandwich else layer.post_attention_layernorm
        self._row(f"{name}.out", layer.self_attn.o_proj, b.heads, layer.post_attention_layernorm if sandwich else None, before_mlp)
        gate_up = mlp.gate_up_proj
        hidden, inner = b.normed.shape[1], b.inner.shape[1]
        op = self.lib.op_gated(
            gate_up.packed.handle,
            b.normed.data_ptr(),
            hidden,
            self.code,
            b.inner.data_ptr(),
            inner,
            0 if gate_up.bias is None else gate_up.bias.data_ptr(),
            activation_code(self.model.spec.hidden_act),
        )
        self.program.add(f"{name}.gate_up", op)
        self._row(f"{name}.down", mlp.down_proj, b.inner, layer.post_feedforward_layernorm if sandwich else None, following)

    def _attention(self, name: str, layer: DecoderLayer, cache: Tensor, angles: tuple[Tensor, int]) -> None:
        b, attention, spec = self.buffers, layer.self_attn, self.model.spec
        proj, core = attention.qkv_proj, attention.attention
        width, bias = b.qkv.shape[1], proj.bias
        kv = (cache.data_ptr(), cache.shape[1], cache.shape[2])
        norms = [getattr(attention, norm) for norm in ("q_norm", "k_norm") if spec.qk_norm]
        plain = self.lib.op_linear(
            proj.packed.handle,
            b.normed.data_ptr(),
            b.normed.shape[1],
            self.code,
            b.qkv.data_ptr(),
            width,
            self.code,
            0 if bias is None else bias.data_ptr(),
        )
        self.program.add(f"{name}.qkv", plain)
        rope = self.lib.op_rope_store(
            b.qkv.data_ptr(),
            width,
            proj.num_heads,
            proj.num_kv_heads,
            spec.head_dim,
            angles[1],
            angles[0].data_ptr(),
            norms[0].weight.data_ptr() if norms else 0,
            norms[1].weight.data_ptr() if norms else 0,
            spec.rms_norm_eps,
            spec.norm_plus_one,
            *kv,
            self.code,
        )
        self.program.add(f"{name}.rope", rope)
        attend = self.lib.op_attention(
            b.qkv.data_ptr(),
            width,
            b.heads.data_ptr(),
            b.heads.shape[1],
            proj.num_heads,
            proj.num_kv_heads,
            spec.head_dim,
            self._array(proj.kv_of_q),
            core.scale,
            core.window or 0,
            core.softcap or 0.0,
            *kv,
            self.code,
        )
        self.program.add(f"{name}.attention", attend)

    def _row(self, name: str, layer: RowParallelLinear, source: Tensor, post: RMSNorm | None, following: RMSNorm | None) -> None:
        """A row-parallel product into the stream, and the next norm's output into `normed`."""
        b, native, packed, tree = self.buffers, self.native, layer.packed, layer.tree
        assert packed is not None
        norm = following or post
        finish = self.lib.finish_new(
            packed.scale_ptr,
            0 if layer.bias is None else layer.bias.data_ptr(),
            0 if post is None else post.weight.data_ptr(),
            b.stream.data_ptr(),
            0 if following is None else following.weight.data_ptr(),
            b.normed.data_ptr(),
            b.stream.shape[1],
            self.model.spec.rms_norm_eps if norm is None else norm.eps,
            self.model.spec.norm_plus_one,
        )
        product = (packed.handle, source.data_ptr(), source.shape[1], self.code)
        group = native.group or (native.local.handle if native.local else 0)
        if group:
            code, counts = self._array(tree.code), self._array(tree.counts)
            tag = len(self.program.names)
            self.program.add(name, self.lib.op_row(*product, group, code, len(tree.code), counts, finish, tag))
        else:
            self._combined_by_python(name, product, tree, finish)
        self.lib.finish_free(finish)

    def _combined_by_python(self, name: str, product: tuple[int, ...], tree: ReductionTree, finish: int) -> None:
        sums, tp = self.buffers.sums, self.model.groups.tp
        assert sums is not None
        hidden, mine = sums.shape[2], tree.counts[tp.rank_in_group]
        flat = sums.view(-1)

        def combine(tokens: int) -> None:
            parts = flat[: mine * tokens * hidden].view(mine, tokens, hidden)
            flat[: tokens * hidden].view(tokens, hidden).copy_(tp.combine_partials(parts, tree))

        self.program.add(name, self.lib.op_partials(*product, sums.data_ptr()))
        self.program.add_stop(f"{name}.combine", combine)
        self.program.add(f"{name}.finish", self.lib.op_finish(sums.data_ptr(), self.code, finish))
