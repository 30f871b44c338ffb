"""Bytes per rank: the reference table, the models' parameter counts, and the engine's own shard map."""

import csv
from dataclasses import replace
from pathlib import Path

import pytest

from lockstep.config.hf import spec_of
from lockstep.config.model_spec import read_config_json
from lockstep.config.source import DEMO_FOLDER
from lockstep.distributed.partition import ShardMap, stage_layers
from lockstep.planner.answer import plan, pricer_of
from lockstep.planner.catalogue import cluster
from lockstep.planner.find import catalogue, find_model
from lockstep.planner.layer import Setting
from lockstep.planner.layout import Layout
from lockstep.planner.memory import (
    fullest_ranks,
    kv_bytes_per_token,
    kv_elements,
    most_heads,
    part_bytes,
    rank_params,
    rank_parts,
    stages,
    weight_bytes,
)
from lockstep.planner.model import from_config
from lockstep.planner.report import report
from lockstep.planner.startable import assumed, weight_dtype

TABLE = list(csv.DictReader((Path(__file__).parent / "data" / "memory_per_rank.csv").open()))
BY_HUB_NAME = {entry["hf_id"].split("/")[1]: name for name, entry in catalogue().items()}


@pytest.mark.parametrize("name", catalogue())
def test_parameters_are_those_of_the_instantiated_model(name):
    shape = find_model(name)[0]
    assert (shape.params, shape.active_params) == (catalogue()[name]["params_total"], catalogue()[name]["params_active"])


@pytest.mark.parametrize("model", sorted({row["model"] for row in TABLE}))
def test_every_split_equals_the_reference_table(model):
    shape = find_model(BY_HUB_NAME[model])[0]
    rows = [row for row in TABLE if row["model"] == model]
    assert rows
    for row in rows:
        tp, pp = int(row["tp"]), int(row["pp"])
        layout = Layout(tp=tp, pp=pp, ep=tp if row["expert_sharding"] == "ep" else 1)
        params = [[rank_params(shape, layout, stage, rank, "reference") for rank in range(tp)] for stage in range(pp)]
        kv = max(kv_bytes_per_token(shape, layout, stage, 0, "reference") for stage in range(pp))
        assert "/".join(str(part.size) for part in stages(shape, pp, "reference")) == row["layers_per_stage"]
        assert max(map(max, params)) == int(row["max_params_per_rank"]), row
        assert sum(map(sum, params)) - shape.params == int(row["replicated_or_padded_params_all_ranks"]), row
        assert kv == int(row["max_kv_bytes_per_token_per_rank_bf16"]), row


@pytest.mark.parametrize(("tp", "pp"), [(1, 1), (2, 1), (3, 2), (5, 1), (7, 3), (8, 4)])
@pytest.mark.parametrize("name", ["llama-3.1-8b", "qwen3-0.6b"])
def test_the_engines_shard_map_holds_as_much(name, tp, pp):
    """Counted again from the map that loader and layers use, with uneven TP and the engine's default partition."""
    raw = catalogue()[name]["config"]
    spec, shape = spec_of(raw, Path(name)), from_config(raw, name)
    for stage, layers in enumerate(stage_layers(spec, pp)):
        for rank in range(tp):
            cut = ShardMap.of(spec, tp, rank)
            q, kv, h = cut.heads.q.size * spec.head_dim, cut.heads.kv.size * spec.head_dim, spec.hidden_size
            layer = h * (2 * q + 2 * kv) + 3 * h * cut.mlp.size + 2 * h + (2 * spec.head_dim if spec.qk_norm else 0)
            first, last = stage == 0, stage == pp - 1
            ends = cut.vocab.size * h * (first + (last and not (first and spec.tie_word_embeddings))) + h * last
            layout = Layout(tp=tp, pp=pp)
            assert rank_params(shape, layout, stage, rank, "balanced") == layers.size * layer + ends
            assert weight_bytes(shape, layout, stage, rank, "balanced") == 2 * (layers.size * layer + ends)
            assert kv_bytes_per_token(shape, layout, stage, rank, "balanced") == layers.size * 2 * kv * 2


def test_int8_keeps_a_scale_for_each_output():
    shape = from_config(read_config_json(DEMO_FOLDER), "demo")
    whole, narrow = weight_bytes(shape, Layout()), weight_bytes(shape, Layout(), weight_dtype="int8")
    spec = shape.spec
    rows = spec.num_layers * ((spec.num_heads + 2 * spec.num_kv_heads) * spec.head_dim + 2 * spec.hidden_size + 2 * spec.intermediate_size)
    matrices = spec.num_layers * (
        spec.hidden_size * spec.head_dim * 2 * (spec.num_heads + spec.num_kv_heads) + 3 * spec.hidden_size * spec.intermediate_size
    )
    assert whole - narrow == matrices * (shape.itemsize - 1) - 4 * rows


def test_whole_experts_are_dealt_out_evenly_first_ranks_one_more():
    shape = find_model("mixtral-8x7b")[0]
    expert = 3 * shape.hidden_size * shape.moe.columns * shape.num_layers
    held = [sum(p.params for p in rank_parts(shape, Layout(tp=3, ep=3), 0, rank) if p.name == "experts") for rank in range(3)]
    assert [params / expert for params in held] == [3, 3, 2]


@pytest.mark.parametrize(("name", "published"), [("gpt-oss-20b", 13_761_264_768), ("gpt-oss-120b", 65_248_815_744)])
def test_four_bit_experts_take_four_bits_and_a_scale_for_32(name, published):
    """published: bytes of all tensors of the checkpoint, as its index says."""
    shape = find_model(name)[0]
    assert weight_bytes(shape, Layout(), weight_dtype="mxfp4") == published
    plain, stored = (weight_bytes(shape, Layout(), weight_dtype=dtype) for dtype in ("", "mxfp4"))
    experts = sum(shape.moe.layers) * shape.moe.experts * 3 * shape.hidden_size * shape.moe.columns
    assert plain - stored == experts * 2 - experts // 2 - experts // 32
    cut = [weight_bytes(shape, Layout(tp=4, ep=ep), rank=0, weight_dtype="mxfp4") for ep in (1, 4)]
    assert all(stored / 4 < held < plain / 4 for held in cut)


@pytest.mark.parametrize(
    ("name", "asked", "stored"),
    [
        ("deepseek-v3", "", "fp8"), ("kimi-k2", "", "fp8"), ("gpt-oss-20b", "", "mxfp4"), ("gpt-oss-120b", "none", ""),
        ("deepseek-v3", "none", ""), ("gpt-oss-20b", "fp8", "fp8"), ("llama-3.1-8b", "", ""), ("llama-3.1-8b", "int8", "int8"),
    ],
)  # fmt: skip
def test_weights_are_taken_as_published_unless_asked_otherwise(name, asked, stored):
    shape = find_model(name)[0]
    assert weight_dtype(shape, asked) == stored
    assert pricer_of(shape, "2x8xH200", asked).setting.weight_dtype == stored


def test_checkpoints_without_a_price_of_their_own_are_priced_plain_and_said():
    raw = {**catalogue()["llama-3.1-8b"]["config"], "quantization_config": {"quant_method": "awq"}}
    shape = from_config(raw, "mine")
    assert weight_dtype(shape, "") == "" and "quantized (awq); priced in bfloat16" in assumed(shape, "")
    assert assumed(find_model("llama-3.1-8b")[0], "") == ""


def test_fp8_is_multiplied_in_fp8_only_where_the_device_does():
    shape = find_model("llama-3.1-8b")[0]
    assert [Setting(shape, cluster(name), "fp8").compute for name in ("H100", "A100")] == ["fp8", "bfloat16"]
    experts = Setting(find_model("gpt-oss-20b")[0], cluster("H100"), "mxfp4")
    assert (experts.compute, experts.stored, experts.experts) == ("bfloat16", "bfloat16", "mxfp4")


def test_every_distinct_rank_is_in_the_answer_and_the_fullest_is_one_of_them():
    odd, spread = {"tp": 3}, {"tp": 2, "pp": 2, "ep": 4, "dp": 4}
    for model, where, fixed in (("llama-3.1-70b", "2x8xH100", odd), ("deepseek-v3", "2x8xH200", spread)):
        found = plan(model, where, fixed=fixed, input_len=500)
        shape = find_model(model)[0]
        assert found.memory in [group.memory for group in found.ranks] and len(found.ranks) > 1
        seen = [(stage, rank) for group in found.ranks for stage in group.stages for rank in group.ranks]
        assert sorted(seen) == [(s, r) for s in range(found.layout.pp) for r in range(max(found.layout.tp, found.layout.ep))]
        stored = "fp8" if shape.quantized else ""
        for group in found.ranks:
            for stage, rank in ((s, r) for s in group.stages for r in group.ranks):
                parts = rank_parts(shape, found.layout, stage, rank % found.layout.tp, ep_rank=rank)
                assert group.memory.weights == sum(part_bytes(part, shape.dtype, stored) for part in parts), (stage, rank)
        data = found.to_json()
        assert [g["memory"]["weights"] for g in data["ranks"]] == [g.memory.weights for g in found.ranks]
        assert max(g["memory"]["kv"] for g in data["ranks"]) >= data["kv_bytes"] > 0
        assert "of each rank" in report(found) and str(found.ranks[0]) in report(found)
    assert "of each rank" not in report(plan("llama-3.1-8b", "1xH100"))


def test_the_fullest_rank_is_not_the_first_where_a_cut_falls_inside_a_kv_head_s_group():
    shape = find_model("qwen3-0.6b")[0]
    three = replace(shape, num_heads=12, num_kv_heads=2)
    kv = [kv_elements(three, 3, rank) for rank in range(3)]
    assert kv[1] > kv[0] and fullest_ranks(three, 3) == (0, 1) and most_heads(three, 3)[1] == 2
    found = plan(three, "3xH100", fixed={"tp": 3})
    assert found.memory.kv_per_token == max(kv) * three.num_layers * 2
    assert fullest_ranks(shape, 2) == (0,)
