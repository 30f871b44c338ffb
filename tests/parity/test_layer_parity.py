"""Each parallel layer against the unsharded torch layer, at every TP size, with uneven cuts, replicated KV, padded vocabulary."""

import pytest
import torch
from torch.nn import functional as F

from lockstep.distributed.partition import head_shard
from lockstep.layers.embedding import ParallelLMHead, VocabParallelEmbedding
from lockstep.layers.linear import ColumnParallelLinear, MergedColumnParallelLinear, ReplicatedLinear, RowParallelLinear
from lockstep.layers.logits import LogitsProcessor
from lockstep.layers.qkv import QKVParallelLinear
from tests.parity.layer_sim import fill, simulate

TPS = range(1, 9)
HEADS = [(8, 8), (8, 4), (8, 2), (8, 1), (14, 2), (9, 3), (12, 6), (24, 8)]  # (query heads, KV heads); all serve TP 1..8


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def linear_pair(out, inp, bias):
    return normal(out, inp) * inp**-0.5, normal(out, seed=7) if bias else None


def close(got, want):
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("tp", TPS)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize("size", [16, 21, 8])
def test_column(tp, bias, skip, size):
    w, b = linear_pair(size, 12, bias)
    x = normal(5, 12, seed=3)
    want = F.linear(x, w, None if skip else b)

    def rank_main(group, gather):
        layer = ColumnParallelLinear(12, size, bias, gather_output=gather, skip_bias_add=skip, tp=group)
        fill(layer, "weight", w)
        if bias:
            fill(layer, "bias", b)
        return (*layer(x), group.calls.total())

    parts = simulate(tp, lambda g: rank_main(g, False))
    close(torch.cat([out for out, _, _ in parts], dim=-1), want)
    assert all(calls == 0 for _, _, calls in parts)
    for out, handed_back, _ in simulate(tp, lambda g: rank_main(g, True)):
        close(out, want)
        assert (handed_back is not None) == (bias and skip)
        if handed_back is not None:
            close(out + handed_back, F.linear(x, w, b))


@pytest.mark.parametrize("tp", TPS)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("sizes", [(16, 16), (21, 21), (8, 19, 30)])
def test_merged_column(tp, bias, sizes):
    pairs = [linear_pair(size, 12, bias) for size in sizes]
    x = normal(5, 12, seed=3)
    want = [F.linear(x, w, b) for w, b in pairs]

    def rank_main(group, gather):
        layer = MergedColumnParallelLinear(12, sizes, bias, gather_output=gather, return_bias=False, tp=group)
        fill(layer, "weight", {i: w for i, (w, _) in enumerate(pairs)})
        if bias:
            fill(layer, "bias", {i: b for i, (_, b) in enumerate(pairs)})
        return layer(x), layer.part_sizes

    local = simulate(tp, lambda g: rank_main(g, False))
    split = [out.split(part_sizes, dim=-1) for out, part_sizes in local]
    for i, full in enumerate(want):
        close(torch.cat([parts[i] for parts in split], dim=-1), full)
    for out, _ in simulate(tp, lambda g: rank_main(g, True)):
        close(out, torch.cat(want, dim=-1))


@pytest.mark.parametrize("tp", TPS)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("size", [16, 21, 8])
@pytest.mark.parametrize("parallel_input", [False, True])
def test_row(tp, bias, size, parallel_input):
    w, b = linear_pair(10, size, bias)
    x = normal(5, size, seed=3)

    def rank_main(group):
        layer = RowParallelLinear(size, 10, bias, input_is_parallel=parallel_input, tp=group)
        fill(layer, "weight", w)
        if bias:
            fill(layer, "bias", b)
        given = x.narrow(-1, layer.shard.start, layer.shard.size) if parallel_input else x
        out, handed_back = layer(given)
        assert handed_back is None
        return out, dict(group.calls)

    for out, calls in simulate(tp, rank_main):
        close(out, F.linear(x, w, b))
        assert calls == ({"all_reduce": 1} if tp > 1 else {})


@pytest.mark.parametrize("tp", [1, 3, 4])
def test_row_partial_sums_and_bias_handed_back(tp):
    w, b = linear_pair(10, 16, True)
    x = normal(5, 16, seed=3)

    def rank_main(group):
        layer = RowParallelLinear(16, 10, True, input_is_parallel=False, reduce_results=False, skip_bias_add=True, tp=group)
        fill(layer, "weight", w)
        fill(layer, "bias", b)
        return layer(x)

    parts = simulate(tp, rank_main)
    close(sum(out for out, _ in parts), F.linear(x, w))
    assert all(torch.equal(handed_back, b) for _, handed_back in parts)


@pytest.mark.parametrize("tp", TPS)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("inner", [64, 44, 8])
def test_mlp_column_feeds_row_with_one_all_reduce(tp, bias, inner):
    up, down = linear_pair(inner, 12, bias), linear_pair(12, inner, bias)
    x = normal(5, 12, seed=3)
    want = F.linear(F.silu(F.linear(x, *up)), *down)

    def rank_main(group):
        first = ColumnParallelLinear(12, inner, bias, return_bias=False, tp=group)
        second = RowParallelLinear(inner, 12, bias, return_bias=False, tp=group)
        for layer, (w, b) in ((first, up), (second, down)):
            fill(layer, "weight", w)
            if bias:
                fill(layer, "bias", b)
        return second(F.silu(first(x))), dict(group.calls)

    for out, calls in simulate(tp, rank_main):
        close(out, want)
        assert calls == ({"all_reduce": 1} if tp > 1 else {})


def attention(q, k, v, kv_of_q):
    """Causal attention, `q [tokens, heads, dim]`, each query head with the KV head that `kv_of_q` names."""
    index = torch.tensor(kv_of_q)
    q, k, v = q.transpose(0, 1), k[:, index].transpose(0, 1), v[:, index].transpose(0, 1)
    return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(0, 1).flatten(1)


@pytest.mark.parametrize("tp", TPS)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("heads", "kv_heads"), HEADS)
def test_attention_block_with_one_all_reduce(tp, bias, heads, kv_heads):
    hidden, dim = 20, 6
    full = {"q": linear_pair(heads * dim, hidden, bias), "k": linear_pair(kv_heads * dim, hidden, bias)}
    full["v"] = (normal(kv_heads * dim, hidden, seed=11), normal(kv_heads * dim, seed=13) if bias else None)
    out_w, out_b = linear_pair(hidden, heads * dim, bias)
    x = normal(7, hidden, seed=3)
    whole = [F.linear(x, *full[name]).unflatten(-1, (-1, dim)) for name in "qkv"]
    want = F.linear(attention(*whole, [h // (heads // kv_heads) for h in range(heads)]), out_w, out_b)

    def rank_main(group):
        qkv = QKVParallelLinear(hidden, dim, heads, kv_heads, bias=bias, return_bias=False, tp=group)
        out = RowParallelLinear(heads * dim, hidden, bias, return_bias=False, units=heads, tp=group)
        fill(qkv, "weight", {name: w for name, (w, _) in full.items()})
        fill(out, "weight", out_w)
        if bias:
            fill(qkv, "bias", {name: b for name, (_, b) in full.items()})
            fill(out, "bias", out_b)
        q, k, v = (part.unflatten(-1, (-1, dim)) for part in qkv.split(qkv(x)))
        assert (q.shape[1], k.shape[1], v.shape[1]) == (qkv.num_heads, qkv.num_kv_heads, qkv.num_kv_heads)
        return out(attention(q, k, v, qkv.kv_of_q)), dict(group.calls)

    for out, calls in simulate(tp, rank_main):
        close(out, want)
        assert calls == ({"all_reduce": 1} if tp > 1 else {})


@pytest.mark.parametrize("tp", [1, 3, 4])
def test_qkv_with_another_value_head_size(tp):
    hidden, dim, v_dim = 20, 6, 4
    full = {"q": normal(8 * dim, hidden), "k": normal(2 * dim, hidden), "v": normal(2 * v_dim, hidden)}
    x = normal(5, hidden, seed=3)

    def rank_main(group):
        qkv = QKVParallelLinear(hidden, dim, 8, 2, bias=False, v_head_size=v_dim, return_bias=False, tp=group)
        fill(qkv, "weight", full)
        return qkv.split(qkv(x))

    for rank, parts in enumerate(simulate(tp, rank_main)):
        cut = head_shard(8, 2, tp, rank)
        for part, name, heads, width in zip(parts, "qkv", (cut.q, cut.kv, cut.kv), (dim, dim, v_dim), strict=True):
            close(part, F.linear(x, full[name])[:, heads.start * width : heads.stop * width])


@pytest.mark.parametrize("tp", TPS)
@pytest.mark.parametrize("vocab", [64, 100, 65, 130, 1000])
def test_embedding_is_exact(tp, vocab):
    table = normal(vocab, 12).bfloat16()
    ids = torch.tensor([0, vocab - 1, 1, vocab // 2, 0, vocab // 3])

    def rank_main(group):
        layer = VocabParallelEmbedding(vocab, 12, tp=group, dtype=torch.bfloat16)
        fill(layer, "weight", table)
        return layer(ids), layer(ids.int()), dict(group.calls)

    for out, out32, calls in simulate(tp, rank_main):
        assert torch.equal(out, table[ids]) and torch.equal(out32, out)
        assert calls == ({"all_reduce": 2} if tp > 1 else {})


@pytest.mark.parametrize("tp", TPS)
@pytest.mark.parametrize("vocab", [64, 100, 65, 130, 1000])
@pytest.mark.parametrize("bias", [False, True])
def test_logits_reach_rank_0_whole(tp, vocab, bias):
    table, b = linear_pair(vocab, 12, bias)
    # All real logits negative in row 0: a padding row's zero would win the argmax if it were not cut off.
    hidden = normal(6, 12, seed=3)
    if bias:
        b = b - 100
    full = F.linear(hidden, table, b)
    want = torch.tanh(full / 30.0) * 30.0 * 0.5

    def rank_main(group):
        head = ParallelLMHead(vocab, 12, bias=bias, tp=group)
        fill(head, "weight", table)
        if bias:
            fill(head, "bias", b)
        logits = LogitsProcessor(vocab, tp=group, scale=0.5, soft_cap=30.0)
        return logits(head, hidden), logits.top_tokens(head, hidden)

    (logits, top), *others = simulate(tp, rank_main)
    assert all(torch.equal(tops, top) for _, tops in others)
    assert logits.dtype == torch.float32 and logits.shape == (6, vocab)
    close(logits, want)
    assert torch.equal(top, logits.argmax(-1))
    assert all(other is None for other, _ in others)


@pytest.mark.parametrize("tp", TPS)
@pytest.mark.parametrize("winners", [(7, 40, 100, 129), (40, 129), (129,), (100, 101)])
def test_top_token_among_equals_is_the_lowest_id(tp, winners):
    table = torch.zeros(130, 12)
    table[list(winners)] = 1.0

    def rank_main(group):
        head = ParallelLMHead(130, 12, tp=group)
        fill(head, "weight", table)
        return LogitsProcessor(130, tp=group).top_tokens(head, torch.ones(3, 12))

    assert simulate(tp, rank_main)[0].tolist() == [winners[0]] * 3


@pytest.mark.parametrize("tp", [1, 3])
def test_tied_head_uses_the_embedding(tp):
    table = normal(100, 12)
    hidden = normal(4, 12, seed=3)

    def rank_main(group):
        embed = VocabParallelEmbedding(100, 12, tp=group)
        head = ParallelLMHead(100, 12, tp=group).tie_weights(embed)
        fill(embed, "weight", table)
        assert head.weight is embed.weight
        return LogitsProcessor(100, tp=group)(head, hidden)

    close(simulate(tp, rank_main)[0], F.linear(hidden, table))


@pytest.mark.parametrize("layer", ["column", "row", "merged", "qkv", "embedding"])
def test_disable_tp_is_whole_and_silent(layer):
    make = {
        "column": lambda g: ColumnParallelLinear(12, 12, gather_output=True, tp=g, disable_tp=True),
        "row": lambda g: RowParallelLinear(12, 12, input_is_parallel=False, tp=g, disable_tp=True),
        "merged": lambda g: MergedColumnParallelLinear(12, (6, 6), tp=g, disable_tp=True),
        "qkv": lambda g: QKVParallelLinear(12, 2, 2, 2, tp=g, disable_tp=True),
        "embedding": lambda g: VocabParallelEmbedding(12, 12, tp=g, disable_tp=True),
    }[layer]
    x = torch.arange(12) if layer == "embedding" else normal(3, 12)
    want = None

    def rank_main(group):
        module = make(group)
        for param in module.parameters():
            param.data = normal(*param.shape)
        out = module(x)
        return out if layer == "embedding" else out[0], group.calls.total()

    for out, calls in simulate(3, rank_main):
        want = out if want is None else want
        assert calls == 0 and torch.equal(out, want) and out.shape[-1] == 12


@pytest.mark.parametrize("bias", [False, True])
def test_replicated(bias):
    w, b = linear_pair(9, 12, bias)
    x = normal(3, 12)

    def rank_main(group):
        layer = ReplicatedLinear(12, 9, bias, tp=group)
        fill(layer, "weight", w)
        if bias:
            fill(layer, "bias", b)
        return (*layer(x), group.calls.total())

    for out, handed_back, calls in simulate(3, rank_main):
        assert calls == 0 and handed_back is None
        close(out, F.linear(x, w, b))
