"""The shard map against brute force, over sizes nobody would choose."""

from itertools import pairwise, product

import pytest
from hypothesis import given as hypothesis_given
from hypothesis import settings
from hypothesis import strategies as st

from lockstep.config.errors import ConfigError
from lockstep.config.model_spec import ModelSpec
from lockstep.distributed.partition import (
    ShardMap,
    StageCosts,
    atom_bounds,
    head_shard,
    layer_partition,
    padded_vocab,
    shard,
    shards,
    stage_layers,
    vocab_shard,
)


def given(*strategies):
    """hypothesis without its 200 ms limit per example, which a busy machine breaks."""
    return lambda test: settings(deadline=None)(hypothesis_given(*strategies)(test))


units = st.integers(1, 20000)
tps = st.integers(1, 64)


def assert_tiles(runs, total):
    """Disjoint, contiguous, complete, in rank order, nobody empty."""
    assert runs[0].start == 0 and runs[-1].stop == total
    assert all(a.stop == b.start for a, b in pairwise(runs))
    assert all(run.size == run.stop - run.start > 0 for run in runs)


@given(units, tps)
def test_shards_tile_the_units_and_are_balanced_to_one_atom(n, tp):
    if tp > n:
        with pytest.raises(ConfigError, match=f"tensor_parallel_size={tp}"):
            shard(n, tp, 0)
        return
    runs = shards(n, tp)
    assert_tiles(runs, n)
    bounds = atom_bounds(n, tp)
    atoms = [bounds.index(run.stop) - bounds.index(run.start) for run in runs]
    assert max(atoms) - min(atoms) <= 1
    assert atoms == sorted(atoms, reverse=True)  # first ranks get one more


@given(units, tps)
def test_atoms_tile_the_units_in_nearly_equal_sizes(n, tp):
    bounds = atom_bounds(n, tp)
    sizes = [b - a for a, b in pairwise(bounds)]
    assert bounds[0] == 0 and bounds[-1] == n
    assert len(sizes) == min(n, 8 if tp <= 8 else tp)
    assert min(sizes) >= 1 and max(sizes) - min(sizes) <= 1


@pytest.mark.parametrize(
    ("n", "tp", "bounds"),
    [
        (8, 1, (0, 1, 2, 3, 4, 5, 6, 7, 8)),
        (14, 3, (0, 2, 4, 5, 7, 9, 11, 12, 14)),  # 1.75 and 3.5 round to nearest, half upwards
        (6, 5, (0, 1, 2, 3, 4, 5, 6)),
        (24, 9, (0, 3, 5, 8, 11, 13, 16, 19, 21, 24)),
    ],
)
def test_atoms_on_known_cases(n, tp, bounds):
    assert atom_bounds(n, tp) == bounds


@given(units, st.integers(1, 8), st.integers(1, 8))
def test_atoms_depend_on_the_model_alone_up_to_tp_8(n, a, b):
    assert atom_bounds(n, a) == atom_bounds(n, b)


@given(st.integers(8, 20000))
def test_cuts_of_tp_2_4_and_8_are_nested(n):
    cuts = [{run.start for run in shards(n, tp)} for tp in (1, 2, 4, 8)]
    assert all(coarse < fine for coarse, fine in pairwise(cuts))


@given(st.integers(16, 20000))
def test_cuts_of_tp_8_and_16_are_nested(n):
    assert {run.start for run in shards(n, 8)} <= {run.start for run in shards(n, 16)}


@given(units)
def test_cuts_at_exact_multiples_are_even(k):
    for tp in (2, 4, 8):
        assert {run.size for run in shards(8 * k, tp)} == {8 * k // tp}


@given(st.integers(1, 16), st.integers(1, 16), st.integers(1, 24))
def test_heads_against_brute_force(group, kv_heads, tp):
    heads = group * kv_heads
    if tp > heads:
        with pytest.raises(ConfigError, match=f"num_attention_heads={heads}"):
            head_shard(heads, kv_heads, tp, tp - 1)
        return
    cuts = [head_shard(heads, kv_heads, tp, rank) for rank in range(tp)]
    assert_tiles([cut.q for cut in cuts], heads)
    for cut in cuts:
        needed = sorted({q // group for q in range(cut.q.start, cut.q.stop)})
        assert list(range(cut.kv.start, cut.kv.stop)) == needed  # every KV head read, none held in vain
        assert [cut.kv.start + local for local in cut.kv_of_q] == [q // group for q in range(cut.q.start, cut.q.stop)]
    if tp in (1, 2, 4, 8) and kv_heads % tp == 0:  # then nothing is replicated
        assert_tiles([cut.kv for cut in cuts], kv_heads)


@given(st.integers(1, 300000), tps, st.sampled_from([1, 8, 64, 128]))
def test_vocabulary(vocab, tp, pad):
    total = padded_vocab(vocab, pad)
    assert total % pad == 0 and 0 <= total - vocab < pad
    if tp > total:
        with pytest.raises(ConfigError, match="padded vocabulary"):
            vocab_shard(vocab, tp, 0, pad)
        return
    cuts = [vocab_shard(vocab, tp, rank, pad) for rank in range(tp)]
    assert_tiles(cuts, total)
    assert max(c.size for c in cuts) - min(c.size for c in cuts) <= 1
    assert cuts[0].size == max(c.size for c in cuts)
    assert [row for c in cuts for row in (c.filled.start, c.filled.stop) if c.filled.size][-1] == vocab
    assert sum(c.filled.size for c in cuts) == vocab
    assert all(c.filled.size == 0 or c.filled.start == c.start for c in cuts)


def spec(**numbers):
    base = {
        "architecture": "LlamaForCausalLM", "hidden_size": 64, "num_layers": 2, "num_heads": 14, "num_kv_heads": 2, "head_dim": 8,
        "intermediate_size": 100, "vocab_size": 130, "max_position_embeddings": 128,
    }  # fmt: skip
    return ModelSpec(**(base | numbers))


@pytest.mark.parametrize("tp", range(1, 9))
def test_shard_map_is_the_parts_together(tp):
    for rank in range(tp):
        found = ShardMap.of(spec(), tp, rank)
        assert found.heads == head_shard(14, 2, tp, rank)
        assert found.mlp == shard(100, tp, rank)
        assert found.vocab == vocab_shard(130, tp, rank)


@pytest.mark.parametrize(
    ("numbers", "tp", "words"),
    [
        ({}, 15, "num_attention_heads=14"),
        ({}, 0, "tensor_parallel_size=0"),
        ({"intermediate_size": 3}, 4, "intermediate_size=3"),
        ({"num_kv_heads": 3}, 1, "num_key_value_heads=3"),
        ({"num_kv_heads": 0}, 1, "num_key_value_heads=0"),
    ],
)
def test_shard_map_says_what_cannot_be(numbers, tp, words):
    with pytest.raises(ConfigError, match=words):
        ShardMap.of(spec(**numbers), tp, 0)


@given(st.integers(1, 200), st.integers(1, 64), st.sampled_from(["even", "reference"]))
def test_layers_of_stages(layers, pp, how):
    if pp > layers:
        with pytest.raises(ConfigError, match=f"pipeline_parallel_size={pp}"):
            layer_partition(layers, pp, how)
        return
    stages = layer_partition(layers, pp, how)
    assert len(stages) == pp
    assert_tiles(stages, layers)
    sizes = [stage.size for stage in stages]
    assert max(sizes) - min(sizes) <= 1
    if how == "reference" and pp > 1:
        assert sizes[-1] == min(sizes)  # the last stage never gets the extra layer
        assert sizes[0] == min(sizes) or layers % pp == pp - 1


@pytest.mark.parametrize(
    ("layers", "pp", "sizes"), [(22, 4, [5, 6, 6, 5]), (61, 4, [15, 15, 16, 15]), (7, 4, [2, 2, 2, 1]), (8, 4, [2, 2, 2, 2]), (5, 1, [5])]
)
def test_the_reference_rule_on_known_cases(layers, pp, sizes):
    assert [stage.size for stage in layer_partition(layers, pp, "reference")] == sizes


@given(st.lists(st.integers(1, 9), min_size=1, max_size=9))
def test_explicit_layers(sizes):
    for how in (sizes, ",".join(map(str, sizes))):
        stages = layer_partition(sum(sizes), len(sizes), how)
        assert [stage.size for stage in stages] == sizes
        assert_tiles(stages, sum(sizes))


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ("1,x", "Invalid partition string"),
        ("", "Invalid partition string"),
        ("2,2,2", r"len\(partitions\)=3 does not match pp_size=2"),
        ([2, 3], r"sum\(partitions\)=5 does not match num_hidden_layers=4"),
        ([4, 0], "fewer than one layer"),
        ([5, -1], "fewer than one layer"),
    ],
)
def test_explicit_layers_that_do_not_fit(how, words):
    with pytest.raises(ConfigError, match=words):
        layer_partition(4, 2, how)


def test_no_stage_at_all():
    with pytest.raises(ConfigError, match="pipeline_parallel_size=0"):
        layer_partition(4, 0)


@st.composite
def sized_specs(draw):
    """Models of all proportions, small enough to try every partition."""
    return spec(
        num_layers=draw(st.integers(1, 9)),
        hidden_size=draw(st.sampled_from([64, 512, 4096])),
        intermediate_size=draw(st.sampled_from([128, 2048, 14336])),
        vocab_size=draw(st.sampled_from([100, 32000, 256000])),
    )


@given(sized_specs(), st.integers(1, 5))
def test_balanced_stages_are_as_cheap_as_any(model, pp):
    if pp > model.num_layers:
        with pytest.raises(ConfigError, match=f"pipeline_parallel_size={pp}"):
            stage_layers(model, pp)
        return
    stages, costs = stage_layers(model, pp), StageCosts.of(model)
    assert_tiles(stages, model.num_layers)
    assert all(stage.size >= 1 for stage in stages)

    def dearest(sizes):
        return max(costs.stage(n, first=i == 0, last=i == pp - 1) for i, n in enumerate(sizes))

    every = [sizes for sizes in product(range(1, model.num_layers + 1), repeat=pp) if sum(sizes) == model.num_layers]
    assert dearest([s.size for s in stages]) <= min(map(dearest, every)) * (1 + 1e-9)


def test_a_heavy_head_takes_layers_off_the_last_stage():
    model = spec(num_layers=16, hidden_size=512, intermediate_size=1024, vocab_size=50000)
    sizes = [s.size for s in stage_layers(model, 4)]
    assert sizes[-1] == min(sizes) < 4 < max(sizes)
    assert [s.size for s in stage_layers(model, 4, "even")] == [4, 4, 4, 4]
    assert [s.size for s in stage_layers(model, 4, "7,4,4,1")] == [7, 4, 4, 1]


def test_a_stage_costs_what_it_holds():
    costs = StageCosts.of(spec(num_layers=6))
    whole = costs.stage(6, first=True, last=True)
    assert whole == pytest.approx(2.0)
