"""The token embedding and the output head, cut by rows of the padded vocabulary."""

from __future__ import annotations

from typing import NoReturn, Unpack

from torch import Tensor, nn
from torch.nn import functional as F

from lockstep.distributed.partition import VOCAB_PADDING, Shard, vocab_shard
from lockstep.kernels.packed import PackedLinear
from lockstep.kernels.product import Product
from lockstep.layers.base import Piece, Place, ShardId, TensorParallelModule


class VocabParallelEmbedding(TensorParallelModule):
    """Token ids to hidden states, `[tokens] -> [tokens, embedding_dim]`, the same on every rank.

    Each rank holds a run of rows of the vocabulary padded to a multiple of `padding_size`. Ids of other ranks give
    zeros, and one all-reduce adds the single non-zero row: exact in any dtype. Padding rows are zero.
    """

    def __init__(self, num_embeddings: int, embedding_dim: int, padding_size: int = VOCAB_PADDING, **place: Unpack[Place]) -> None:
        super().__init__(**place)
        self.num_embeddings = num_embeddings
        self.embedding_dim = embedding_dim
        self.vocab_shards = tuple(vocab_shard(num_embeddings, self.tp_size, rank, padding_size) for rank in range(self.tp_size))
        self.shard = self.vocab_shards[self.tp_rank]
        self.cuts = tuple(Shard(rows.start, rows.stop) for rows in self.vocab_shards)
        self.num_embeddings_padded = self.shard.padded_size
        self.weight = self._empty(self.shard.size, embedding_dim)
        self._zero_padding(self.weight)
        self.packed: PackedLinear | None = None
        self._product: Product | None = None

    def _zero_padding(self, param: Tensor) -> None:
        param[self.shard.filled.size :].zero_()

    def pieces(self, param: str, shard_id: ShardId = None) -> Piece:
        self._check_shard_id(param, shard_id)
        rows = self.shard.filled
        shape = (self.num_embeddings,) if param == "bias" else (self.num_embeddings, self.embedding_dim)
        return Piece(0, 0, rows.start, rows.stop, shape)

    def pack(self) -> None:
        """Put the weight into the order in which the CPU kernels read it, for `local_logits`, and let go of the plain one."""
        self.packed = PackedLinear(self.weight.data)
        self._product = Product(self.packed)
        self.weight.data = self.weight.data.new_empty(0)

    @property
    def logits_bytes(self) -> int:
        """What `local_logits` keeps between calls."""
        return 0 if self._product is None else self._product.nbytes

    def local_logits(self, hidden: Tensor, bias: Tensor | None = None) -> Tensor:
        """`hidden [rows, embedding_dim]` times this rank's rows: `[rows, rows of this rank]`.

        From packed weights the result is float32, and overwritten by the next call.
        """
        if self._product is None:
            return F.linear(hidden, self.weight, bias)
        logits = self._product(hidden)
        return logits if bias is None else logits + bias

    def forward(self, input_ids: Tensor) -> Tensor:
        if self.tp_size == 1:
            return F.embedding(input_ids, self.weight)
        local = input_ids - self.shard.start
        elsewhere = (local < 0) | (local >= self.shard.size)
        out = F.embedding(local.masked_fill_(elsewhere, 0), self.weight)
        out.masked_fill_(elsewhere.unsqueeze(-1), 0)
        self.tp.all_reduce_(out)
        return out

    def extra_repr(self) -> str:
        rows = f"rows [{self.shard.start}, {self.shard.stop})"
        return f"{self.num_embeddings} (padded {self.num_embeddings_padded}) x {self.embedding_dim}, {rows}"


class ParallelLMHead(VocabParallelEmbedding):
    """The output head's weight `[vocab rows of this rank, hidden]`. `LogitsProcessor` multiplies by it."""

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        *,
        bias: bool = False,
        padding_size: int = VOCAB_PADDING,
        **place: Unpack[Place],
    ) -> None:
        super().__init__(num_embeddings, embedding_dim, padding_size, **place)
        if bias:
            self.bias = self._empty(self.shard.size)
            self._zero_padding(self.bias)
        else:
            self.register_parameter("bias", None)

    def tie_weights(self, embedding: VocabParallelEmbedding) -> ParallelLMHead:
        """Use the embedding's weight as the head's own. Returns self. Raises ValueError when they are cut differently."""
        if embedding.vocab_shards != self.vocab_shards or embedding.embedding_dim != self.embedding_dim:
            raise ValueError(f"cannot tie a head of {self.extra_repr()} to an embedding of {embedding.extra_repr()}.")
        self.weight: nn.Parameter = embedding.weight
        return self

    def forward(self, input_ids: Tensor) -> NoReturn:
        raise RuntimeError("LMHead's weights should be used in the sampler.")
