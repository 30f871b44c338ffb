"""The printed commands, read back by our own command line and judged by our own validation."""

import shlex
from pathlib import Path

import pytest

from lockstep.cli.flags import parse
from lockstep.config.build import build_config
from lockstep.config.errors import ConfigError
from lockstep.config.hf import spec_of
from lockstep.config.nodes import check_nodes
from lockstep.config.replicas import check_replicas
from lockstep.config.serve import ServeOptions
from lockstep.config.source import DEMO_FOLDER
from lockstep.config.validate import check, check_available, check_values
from lockstep.planner import plan
from lockstep.planner.command import Limits, commands
from lockstep.planner.find import catalogue
from lockstep.planner.layout import Layout

LIMITS = Limits(64, 2048, 4096)
HOSTS = [f"10.0.0.{i}" for i in range(1, 17)]


def read(command):
    """(settings, options) of a printed line, by the parser of `lockstep serve`."""
    words = [word for word in shlex.split(command.line) if not word.startswith("CUDA_VISIBLE_DEVICES=")]
    assert words[:2] == ["lockstep", "serve"]
    found = parse("serve", words[2:], ServeOptions, max_tokens=None, description="", sampling=False)
    return found.config, found.options


def judge(config, options):
    """The rules that need neither the machine nor the checkpoint, as `validate.check` applies them."""
    check_values(config)
    check_available(config.parallel)
    check_nodes(config.parallel, headless=options.headless)
    check_replicas(config.parallel, headless=options.headless and config.parallel.nnodes == 1)


RUNS = [
    (Layout(), 1, 1),
    (Layout(tp=8), 1, 1),
    (Layout(tp=2, pp=3), 1, 1),
    (Layout(tp=2, dp=4), 1, 1),
    (Layout(tp=4, dp=3), 2, 1),  # replicas on two nodes, one server
    (Layout(tp=8, pp=2), 2, 1),  # a replica over two nodes
    (Layout(tp=16), 2, 1),
    (Layout(tp=8, pp=2, dp=2), 4, 1),  # two of those, one server
]


@pytest.mark.parametrize(("layout", "nodes", "servers"), RUNS, ids=str)
def test_what_the_engine_runs_is_read_back_and_keeps_every_rule(layout, nodes, servers):
    lines = commands("m", layout, LIMITS, HOSTS[:nodes], 8)
    assert [line.node for line in lines] == HOSTS[:nodes]
    found = [read(line) for line in lines]
    assert sum(not options.headless for _, options in found) == servers
    ranks = 0
    for config, options in found:
        judge(config, options)
        p = config.parallel
        assert (p.tensor_parallel_size, p.pipeline_parallel_size) == (layout.tp, layout.pp)
        assert (config.scheduler.max_num_seqs, config.scheduler.max_num_batched_tokens, config.model.max_model_len) == (64, 2048, 4096)
        assert p.pipeline_layer_partition == ("even" if layout.pp > 1 else None)
        ranks += p.ranks_here
    assert ranks == layout.devices
    leaders = {p.master_addr if p.nnodes > 1 else p.data_parallel_address for p in (config.parallel for config, _ in found)}
    assert nodes == 1 or len(leaders) == servers


@pytest.mark.parametrize(
    ("layout", "nodes", "missing"),
    [
        (Layout(tp=8, ep=8), 1, "expert parallelism"),
        (Layout(tp=4, dp=4, ep=16), 2, "expert parallelism"),
        (Layout(tp=2, dp=8, ep=4), 2, "expert parallelism"),
        (Layout(tp=8, pp=2, dp=2, ep=16), 4, "expert parallelism"),
        (Layout(tp=4, cp=2), 1, "prefill context parallelism"),
        (Layout(tp=8, dcp=2), 1, "decode context parallelism"),
        (Layout(tp=8, cp=2, pp=2), 4, "prefill context parallelism"),
    ],
    ids=str,
)
def test_what_it_does_not_run_yet_is_read_back_and_named(layout, nodes, missing):
    lines = commands("m", layout, LIMITS, HOSTS[:nodes], 8)
    assert {line.node for line in lines} == set(HOSTS[:nodes])
    for line in lines:
        config, options = read(line)
        with pytest.raises(ConfigError, match=f"{missing} is not available yet"):
            judge(config, options)


@pytest.mark.parametrize("name", ["mixtral-8x7b", "deepseek-v3", "gpt-oss-120b", "qwen3-235b-a22b"])
def test_models_that_it_does_not_run_yet_are_named(name):
    with pytest.raises(ConfigError, match="is not supported"):
        spec_of(catalogue()[name]["config"], Path(name))


def test_a_plan_for_a_local_model_passes_the_whole_validation():
    found = plan(str(DEMO_FOLDER), "1x2xH100", input_len=64, output_len=16, fixed={"tp": 2})
    assert [c.node for c in found.commands] == ["node0"]
    config, _ = read(found.commands[0])
    cpu = build_config(**{**vars(config.model), **vars(config.parallel), **vars(config.cache), **vars(config.scheduler), "device": "cpu"})
    _, spec, folder = check(cpu)
    assert folder == DEMO_FOLDER and spec.num_heads >= config.parallel.tensor_parallel_size == 2


def test_int8_is_a_flag_that_the_engine_has():
    found = plan("llama-3.1-70b", "1x1xH100", input_len=64, output_len=16, quantization="int8")
    config, options = read(found.commands[0])
    judge(config, options)
    assert config.model.quantization == "int8" and config.model.model == "meta-llama/Meta-Llama-3.1-70B"


def test_servers_on_one_node_have_devices_and_ports_of_their_own():
    lines = commands("m", Layout(tp=1, dp=16, ep=2), LIMITS, HOSTS[:2], 8)
    found = [(line.node, shlex.split(line.line)[0], read(line)[1].port) for line in lines]
    pairs = [f"CUDA_VISIBLE_DEVICES={i},{i + 1}" for i in (0, 2, 4, 6)]
    assert found == [(host, pair, 8000 + i) for host in HOSTS[:2] for i, pair in enumerate(pairs)]
    alone = commands("m", Layout(tp=4, dp=2, ep=8), LIMITS, HOSTS[:1], 8)
    assert [line.line.split()[0] for line in alone] == ["lockstep"]


@pytest.mark.parametrize(
    ("model", "where", "ask", "missing"),
    [
        ("llama-3.1-8b", "1x8xH100", {}, []),
        ("llama-3.1-8b", "1xH100", {"quantization": "fp8"}, ["fp8 weights"]),
        ("llama-3.1-8b", "1xH100", {"quantization": "int8"}, ["int8 weights on a GPU"]),
        ("qwen3-0.6b", "cpu", {"quantization": "int8"}, []),
        ("llama-3.1-8b", "1x8xMI300X", {}, ["devices like MI300X"]),
        ("qwen3-0.6b", "1xTPU-v5e", {}, ["devices like TPU-V5E"]),
        ("mixtral-8x7b", "8xH100", {"fixed": {"ep": 1}}, ["MoE"]),
        ("gpt-oss-20b", "8xH100", {"fixed": {"ep": 2}}, ["MoE", "expert parallelism", "mxfp4 weights"]),
    ],
)
def test_what_is_missing_is_named_and_the_command_is_read_all_the_same(model, where, ask, missing):
    found = plan(model, where, input_len=64, output_len=16, **ask)
    assert len(found.missing) == len(missing) and all(a.startswith(b) for a, b in zip(found.missing, missing, strict=True))
    assert found.startable == (not missing) == found.to_json()["startable"]
    assert all(any(words in note for note in found.notes) for words in found.missing)
    for line in found.commands:
        read(line)
    if ask.get("quantization") == "fp8":
        assert any("starts bfloat16 weights" in note for note in found.notes)
