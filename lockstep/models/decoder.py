"""The decoder skeleton: embedding, layers, last norm, head. A model is a small subclass (see llama.py)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor, nn

from lockstep.attention.backends import make_backend
from lockstep.attention.batch import I64, AttentionBatch
from lockstep.attention.layer import KVLayerSpec
from lockstep.config.model_spec import ModelSpec
from lockstep.distributed.partition import stage_layers
from lockstep.layers.embedding import ParallelLMHead, VocabParallelEmbedding
from lockstep.layers.logits import LogitsProcessor
from lockstep.layers.rotary import RotaryEmbedding
from lockstep.models.blocks import Build, DecoderLayer, Step
from lockstep.weights.name_map import WeightRule, elsewhere, ignore, linear, per_layer

if TYPE_CHECKING:
    from lockstep.distributed.groups import ParallelGroups
    from lockstep.models.native import NativeDecoder

LayerWatcher = Callable[[int, Tensor], None]  # (layer, residual stream [tokens, hidden] after it)
Intermediate = dict[str, Tensor]  # "hidden_states" and "residual", each [tokens, hidden]: what one stage hands the next


class DecoderModel(nn.Module):
    """This rank's part of a decoder: its shard of the layers of its pipeline stage.

    The first stage has the embedding, the last one the norm and the head; where both are tied, both ends hold the weight.
    A subclass names its layer class and, in `layer_rules`, what its checkpoint calls the parts of a layer.
    """

    layer_class: ClassVar[type[DecoderLayer]] = DecoderLayer

    def __init__(
        self,
        spec: ModelSpec,
        groups: ParallelGroups,
        dtype: torch.dtype,
        device: torch.device | str,
        backend: str = "torch",
        partition: str | None = None,
    ) -> None:
        """partition: how layers are dealt out to stages, see `stage_layers`."""
        super().__init__()
        assert len(spec.layer_kinds) == spec.num_layers, "layer_kinds names each layer's kind"
        self.spec, self.groups, self.dtype, self.device = spec, groups, dtype, torch.device(device)
        build = Build(spec, groups.tp, dtype, self.device, make_backend(backend))
        self.native: NativeDecoder | None = None
        self.watcher: LayerWatcher | None = None
        stage, stages = groups.pp.rank_in_group, groups.pp.world_size
        self.is_first, self.is_last = stage == 0, stage == stages - 1
        owned = stage_layers(spec, stages, partition)[stage]
        self.start, self.end = owned.start, owned.stop
        if self.is_first or (self.is_last and spec.tie_word_embeddings):
            self.embed_tokens = VocabParallelEmbedding(spec.vocab_size, spec.hidden_size, **build.place("embed_tokens"))
        self.stack = [self.layer_class(build, i, f"layers.{i}") for i in range(self.start, self.end)]
        self.layers = nn.ModuleDict({str(self.start + i): layer for i, layer in enumerate(self.stack)})
        if self.is_last:
            self.norm = build.norm()
            self.logits = LogitsProcessor(spec.vocab_size, tp=groups.tp, soft_cap=spec.logits_softcap)
            if not spec.tie_word_embeddings:
                self.lm_head = ParallelLMHead(spec.vocab_size, spec.hidden_size, **build.place("lm_head"))
        self.rope = RotaryEmbedding(spec.head_dim, spec.rope, device=self.device)
        self.rope_local = None if spec.rope_local is None else RotaryEmbedding(spec.head_dim, spec.rope_local, device=self.device)
        # The scale as the model's own dtype holds it: Gemma was trained with the rounded number.
        self.embedding_scale = torch.tensor(spec.embedding_scale, dtype=dtype).item()

    @torch.inference_mode()
    def forward(
        self,
        input_ids: Tensor,
        batch: AttentionBatch,
        intermediate: Intermediate | None = None,
        wanted: I64 | None = None,
    ) -> Tensor | Intermediate:
        """`input_ids [tokens]` of the batch's rows -> normed hidden states `[tokens, hidden]`; before the last stage, what the next takes.

        `intermediate` is the previous stage's result (None on the first, which alone reads input_ids). Keys and values of
        the tokens are in the cache afterwards.

        wanted: the tokens, ascending, whose hidden states are asked for, all by default. The kernels then return those rows
        only, `[wanted, hidden]`, unless layers are watched; plain torch returns all rows.
        """
        if self.native is not None:
            return self.native.forward(input_ids, batch, intermediate, wanted)
        residual: Tensor | None = None
        if intermediate is None:
            assert self.is_first, "a later pipeline stage needs the result of the one before"
            hidden = self.embed_tokens(input_ids)
            if self.embedding_scale != 1.0:
                hidden = hidden * self.embedding_scale
        else:
            hidden, residual = intermediate["hidden_states"], intermediate["residual"]
        full = self.rope.cos_sin(batch.positions)
        step = Step(batch, full, full if self.rope_local is None else self.rope_local.cos_sin(batch.positions))
        for index, layer in enumerate(self.stack, self.start):
            hidden, residual = layer(hidden, residual, step)
            if self.watcher is not None:
                self.watcher(index, hidden + residual)
        assert residual is not None
        if not self.is_last:
            return {"hidden_states": hidden, "residual": residual}
        normed: Tensor = self.norm(hidden, residual)[0]
        return normed

    def pack(self, max_tokens: int, quantization: str | None = None) -> None:
        """Turn the loaded weights into the CPU kernels' form; steps of at most `max_tokens` tokens run on them from now on.

        Ask `models.native.why_not` first. Every rank of the TP group must call it.
        """
        from lockstep.models.native import NativeDecoder

        self.native = NativeDecoder(self, max_tokens, quantization)

    def watch_layers(self, watcher: LayerWatcher | None) -> None:
        """Call `watcher` after each layer of later steps; None: nobody. For debugging: it costs time."""
        self.watcher = watcher
        if self.native is not None:
            self.native.rebuild()

    def packers(self, quantization: str | None = None) -> dict[str, Callable[[], None]]:
        """By module name, how to pack each module that the CPU kernels read packed and that is not yet. Packing lets go of its weight.

        An embedding tied to the head is read from the packed form. With a quantization, every rank of the TP group must
        call them, in one order.
        """
        found: dict[nn.Module, Callable[[], None]] = {}
        for layer in self.stack:
            found |= {linear: partial(linear.pack, quantization) for linear in layer.products() if linear.packed is None}
        if self.is_last and self.head.packed is None:
            found[self.head] = self.head.pack
        return {name: found[module] for name, module in self.named_modules() if module in found}

    @property
    def head(self) -> VocabParallelEmbedding:
        """The output head's weight: the embedding's where they are tied. Last stage only."""
        return self.embed_tokens if self.spec.tie_word_embeddings else self.lm_head

    @torch.inference_mode()
    def compute_logits(self, hidden: Tensor) -> Tensor | None:
        """`hidden [rows, hidden]` -> logits `[rows, vocab]` float32 on TP rank 0, None on the others. Last stage only.

        Every TP rank must call it: they gather.
        """
        logits: Tensor | None = self.logits(self.head, hidden)
        return logits

    @torch.inference_mode()
    def compute_top_tokens(self, hidden: Tensor) -> Tensor:
        """The argmax of compute_logits, `[rows]`, on every TP rank, with one pair per row exchanged. Last stage only."""
        return self.logits.top_tokens(self.head, hidden)

    def kv_layers(self) -> list[KVLayerSpec]:
        """What each of this stage's layers keeps per token, in layer order."""
        return [KVLayerSpec(layer.self_attn.attention.num_kv, self.spec.head_dim) for layer in self.stack]

    def bind_kv(self, caches: Sequence[Tensor]) -> None:
        """Give each layer its cache `[2, num_blocks, block_size, num_kv_heads, head_dim]`, in the order of kv_layers."""
        assert len(caches) == len(self.stack), f"{len(caches)} caches for {len(self.stack)} layers"
        if self.native is not None:
            self.native.bind_kv(caches)
        for layer, kv in zip(self.stack, caches, strict=True):
            layer.self_attn.attention.bind_kv(kv)

    def layer_rules(self) -> list[WeightRule]:
        """One layer's rules, `{i}` for its number."""
        raise NotImplementedError

    def weight_map(self) -> list[WeightRule]:
        """Every tensor of the checkpoint and where it goes, other stages' included (`here=False`)."""
        tied = self.spec.tie_word_embeddings
        rules = [
            *elsewhere([WeightRule("model.embed_tokens.weight", "embed_tokens")], self.is_first or (self.is_last and tied)),
            *per_layer(self.layer_rules(), self.spec.num_layers, range(self.start, self.end)),
            *elsewhere([WeightRule("model.norm.weight", "norm")], self.is_last),
        ]
        if tied:
            # Some tied checkpoints store the head a second time.
            return [*rules, *ignore("lm_head.weight")]
        return [*rules, *elsewhere(linear("lm_head", "lm_head"), self.is_last)]
