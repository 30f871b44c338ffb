"""What layers refuse, and the conventions callers rely on. Their arithmetic is in tests/parity."""

import pytest
import torch

from lockstep.config.errors import ConfigError
from lockstep.config.model_spec import RopeSpec
from lockstep.layers.activation import gated_activation
from lockstep.layers.embedding import ParallelLMHead, VocabParallelEmbedding
from lockstep.layers.linear import ColumnParallelLinear, MergedColumnParallelLinear, ReplicatedLinear, RowParallelLinear
from lockstep.layers.logits import LogitsProcessor
from lockstep.layers.qkv import QKVParallelLinear
from lockstep.layers.rotary import RotaryEmbedding


class Rank:
    """A rank of a group that never communicates."""

    def __init__(self, size=1, rank=0):
        self.world_size, self.rank_in_group = size, rank


def test_a_bias_on_partial_sums_is_refused():
    with pytest.raises(ValueError, match="When not reduce the results, adding bias"):
        RowParallelLinear(8, 8, bias=True, reduce_results=False, tp=Rank(2))
    RowParallelLinear(8, 8, bias=False, reduce_results=False, tp=Rank(2))


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda tp: ColumnParallelLinear(8, 4, tp=tp), "tensor_parallel_size=5"),
        (lambda tp: RowParallelLinear(4, 8, tp=tp), "tensor_parallel_size=5"),
        (lambda tp: MergedColumnParallelLinear(8, (16, 4), tp=tp), "tensor_parallel_size=5"),
        (lambda tp: QKVParallelLinear(8, 2, 4, 2, tp=tp), "num_attention_heads=4"),
        (lambda tp: QKVParallelLinear(8, 2, 8, 3, tp=tp), "num_key_value_heads=3"),
    ],
)
def test_more_ranks_than_units(make, words):
    with pytest.raises(ConfigError, match=words):
        make(Rank(5))


def test_units_must_be_equal():
    with pytest.raises(ValueError, match="o_proj has 10 columns, which cannot be 4 equal units"):
        RowParallelLinear(10, 8, units=4, prefix="o_proj", tp=Rank(2))


@pytest.mark.parametrize(
    ("layer", "param", "shard_id", "words"),
    [
        (lambda: QKVParallelLinear(8, 2, 4, 2, tp=Rank()), "weight", None, "must be one of"),
        (lambda: QKVParallelLinear(8, 2, 4, 2, prefix="attn", tp=Rank()), "bias", "w", r"shard_id='w' of attn\.bias"),
        (lambda: MergedColumnParallelLinear(8, (4, 4), tp=Rank()), "weight", 2, "shard_id=2"),
        (lambda: ColumnParallelLinear(8, 4, tp=Rank()), "weight", "q", "shard_id='q'"),
        (lambda: RowParallelLinear(8, 4, tp=Rank()), "weight", 0, "shard_id=0"),
        (lambda: RowParallelLinear(8, 4, tp=Rank()), "bias", 0, "shard_id=0"),
        (lambda: VocabParallelEmbedding(8, 4, tp=Rank()), "weight", 0, "shard_id=0"),
    ],
)
def test_unknown_shard_ids(layer, param, shard_id, words):
    with pytest.raises(ValueError, match=words):
        layer().pieces(param, shard_id)


@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize("make", [ReplicatedLinear, ColumnParallelLinear, RowParallelLinear])
def test_the_bias_is_added_or_handed_back_never_both(make, skip):
    layer = make(6, 4, tp=Rank(), skip_bias_add=skip)
    layer.weight.data.zero_()
    layer.bias.data.fill_(2.0)
    out, bias = layer(torch.ones(3, 6))
    assert (out == (0 if skip else 2)).all()
    assert (bias is layer.bias) if skip else (bias is None)
    plain = make(6, 4, tp=Rank(), return_bias=False)
    assert isinstance(plain(torch.ones(3, 6)), torch.Tensor)
    none = make(6, 4, bias=False, tp=Rank(), skip_bias_add=skip)
    assert none.bias is None and none(torch.ones(3, 6))[1] is None


def test_parameters_are_on_the_asked_type_and_device_and_need_no_gradient():
    layer = QKVParallelLinear(8, 2, 4, 2, tp=Rank(3, 1), dtype=torch.bfloat16, device="meta")
    for param in layer.parameters():
        assert param.dtype == torch.bfloat16 and param.device.type == "meta" and not param.requires_grad


def test_the_head_is_not_called():
    head = ParallelLMHead(10, 4, tp=Rank())
    with pytest.raises(RuntimeError, match="should be used in the sampler"):
        head(torch.zeros(1, dtype=torch.long))


def test_tying_what_is_cut_differently():
    head = ParallelLMHead(100, 4, tp=Rank(2))
    for embedding in (
        VocabParallelEmbedding(100, 4, tp=Rank(3)),
        VocabParallelEmbedding(99, 4, tp=Rank(2)),
        VocabParallelEmbedding(100, 5, tp=Rank(2)),
    ):
        with pytest.raises(ValueError, match="cannot tie"):
            head.tie_weights(embedding)


def test_padding_rows_are_zero_from_the_start():
    for rank in range(3):
        head = ParallelLMHead(70, 4, bias=True, tp=Rank(3, rank))
        real = head.shard.filled.size
        assert (head.weight[real:] == 0).all() and (head.bias[real:] == 0).all()
    assert real < head.shard.size


def test_settings_that_cannot_be():
    with pytest.raises(ValueError, match="soft_cap=0"):
        LogitsProcessor(10, tp=Rank(), soft_cap=0.0)
    with pytest.raises(ValueError, match="hidden_act='tanh'"):
        gated_activation("tanh")
    with pytest.raises(ValueError, match="rope type 'yarn'"):
        RotaryEmbedding(8, RopeSpec(type="yarn"))
    with pytest.raises(ValueError, match="rotary_dim=7"):
        RotaryEmbedding(8, RopeSpec(), rotary_dim=7)
    with pytest.raises(ValueError, match="original_max_position_embeddings"):
        RotaryEmbedding(8, RopeSpec(type="llama3", factor=8.0))


def test_a_layer_says_what_it_holds():
    text = repr(torch.nn.ModuleList([ColumnParallelLinear(8, 9, tp=Rank(2, 1)), VocabParallelEmbedding(70, 4, tp=Rank(2, 1))]))
    assert "8 -> 9" in text and "rank 1 of 2" in text and "rows [64, 128)" in text
