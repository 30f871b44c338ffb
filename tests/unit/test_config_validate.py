"""Every rule of the configuration: what breaks it, and that the message names setting, value, rule and remedy."""

from __future__ import annotations

import json
import logging
import re
from pathlib import Path

import pytest

from lockstep.config import devices, validate
from lockstep.config.build import build_config
from lockstep.config.errors import ConfigError
from lockstep.config.model_spec import ModelSpec
from lockstep.config.tree import EngineConfig
from lockstep.config.validate import resolve

HEADS, LAYERS, LIMIT = 6, 2, 128
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 96,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": 2,
    "max_position_embeddings": LIMIT,
    "rope_theta": 10000.0,
    "rms_norm_eps": 1e-6,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "eos_token_id": 1,
    "torch_dtype": "bfloat16",
}


def checkpoint(folder: Path, **changes: object) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(CONFIG | changes))
    (folder / "model.safetensors").write_bytes(b"")  # resolving never reads the weights
    return folder


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(devices, "cuda_device_count", lambda: 0)
    return str(checkpoint(tmp_path / "model"))


# setting and value -> what the message must name besides them
BROKEN = [
    ({"tensor_parallel_size": 0}, ["greater than 0"]),
    ({"tensor_parallel_size": -1}, ["greater than 0"]),
    ({"tensor_parallel_size": HEADS + 1}, [f"{HEADS} attention heads", f"use at most {HEADS}"]),
    ({"tensor_parallel_size": "2"}, ["wrong type str", "int"]),
    ({"tensor_parallel_size": True}, ["wrong type bool", "int"]),
    ({"tensor_parallel_size": 2.0}, ["wrong type float", "int"]),
    ({"pipeline_parallel_size": 0}, ["greater than 0"]),
    ({"pipeline_parallel_size": LAYERS + 1}, [f"num_hidden_layers={LAYERS}", f"use at most {LAYERS}"]),
    ({"pipeline_layer_partition": "halves"}, ["Invalid partition string", "balanced, even, reference"]),
    ({"pipeline_layer_partition": "1,1,1", "pipeline_parallel_size": 2}, ["len(partitions)=3", "pp_size=2"]),
    ({"distributed_executor_backend": "uni", "pipeline_parallel_size": 2}, ["one rank", "pipeline_parallel_size=2", "use mp"]),
    ({"prefill_context_parallel_size": 2}, ["prefill context parallelism is not available yet"]),
    ({"decode_context_parallel_size": 2}, ["decode context parallelism is not available yet"]),
    ({"enable_expert_parallel": True}, ["expert parallelism is not available yet"]),
    ({"nnodes": 2, "tensor_parallel_size": 2, "distributed_executor_backend": "ray"}, ["mp, and it is 'ray'", "use mp"]),
    (
        {"distributed_executor_backend": "external_launcher"},
        ["RANK", "not in the environment", "torchrun --nproc-per-node=1"],
    ),
    ({"distributed_executor_backend": "bogus"}, ["unknown", "uni, mp"]),
    ({"distributed_executor_backend": "unii"}, ["unknown", "Did you mean 'uni'?"]),
    ({"distributed_executor_backend": "uni", "tensor_parallel_size": 2}, ["one rank", "tensor_parallel_size=2", "use mp"]),
    ({"nnodes": 0}, ["greater than 0"]),
    ({"nnodes": 2}, ["world_size=1 must be divisible by nnodes=2"]),
    ({"nnodes": 2, "tensor_parallel_size": 3}, ["world_size=3 must be divisible by nnodes=2", "change tensor_parallel_size"]),
    ({"node_rank": 2, "nnodes": 2, "tensor_parallel_size": 2}, ["node_rank=2 must be from 0 to nnodes - 1 (nnodes=2)"]),
    ({"node_rank": -1}, ["from 0 to nnodes - 1"]),
    ({"node_rank": 1, "nnodes": 2, "tensor_parallel_size": 2}, ["takes no requests", "--headless"]),
    ({"nnodes": 2, "distributed_executor_backend": "uni"}, ["nnodes=2 > 1 can only be set when", "use mp"]),
    ({"nnodes": 3, "data_parallel_size": 2, "tensor_parallel_size": 3}, ["data_parallel_size=2", "divisible by the other"]),
    (
        {"nnodes": 4, "data_parallel_size": 2, "tensor_parallel_size": 3},
        ["world_size=3 must be divisible by 2, the nodes of each"],
    ),
    ({"nnodes": 2, "data_parallel_size": 2, "data_parallel_size_local": 1}, ["data_parallel_size_local=1 with nnodes=2", "leave"]),
    ({"nnodes": 2, "data_parallel_size": 2, "data_parallel_rank": 0}, ["data_parallel_rank=0 with nnodes=2", "leave"]),
    ({"nnodes": 2, "data_parallel_size": 2, "data_parallel_address": "a"}, ["data_parallel_address=a with nnodes=2", "master_addr"]),
    ({"nnodes": 2, "data_parallel_size": 2, "data_parallel_backend": "ray"}, ["data_parallel_backend=ray with nnodes=2", "leave"]),
    (
        {"master_port": 65535, "nnodes": 4, "data_parallel_size": 2, "tensor_parallel_size": 2},
        ["master_port=65535 with data_parallel_size=2", "65536 is none", "at most 65534"],
    ),
    ({"master_port": 70000}, ["master_port=70000", "1 to 65535"]),
    ({"master_port": 70000, "nnodes": 2, "tensor_parallel_size": 2}, ["master_port=70000", "1 to 65535"]),
    ({"master_addr": "0.0.0.0", "nnodes": 2, "tensor_parallel_size": 2}, ["master_addr='0.0.0.0'", "node 0"]),
    ({"node_timeout_seconds": 0}, ["greater than 0"]),
    ({"distributed_timeout_seconds": 0}, ["greater than 0"]),
    ({"execute_model_timeout_seconds": -5.0}, ["greater than 0"]),
    ({"execute_model_timeout_seconds": float("inf")}, ["greater than 0"]),
    ({"startup_timeout_seconds": 0}, ["greater than 0"]),
    ({"threads_per_rank": 0}, ["greater than 0", "automatic"]),
    ({"dtype": "bf16"}, ["not one of", "Did you mean 'bfloat16'?"]),
    ({"dtype": "int8"}, ["not one of", "float32, bfloat16, float16"]),
    ({"load_format": "pt"}, ["not one of auto, safetensors, dummy"]),
    ({"device": "tpu"}, ["not one of auto, cpu, cuda"]),
    ({"device": "cuda"}, ["no CUDA device is visible"]),
    ({"log_level": "loud"}, ["not one of debug, info, warning, error"]),
    ({"seed": -1}, ["from 0 to 2**63 - 1"]),
    ({"max_model_len": 0}, ["greater than 0"]),
    ({"max_model_len": LIMIT + 1}, [f"limit of {LIMIT}", f"use at most {LIMIT}"]),
    ({"block_size": 0}, ["greater than 0"]),
    ({"block_size": 24}, ["power of two", "use 16"]),
    ({"block_size": 4096}, ["power of two from 1 to 1024", "use 1024"]),
    ({"gpu_memory_utilization": 0.0}, ["greater than 0 and at most 1"]),
    ({"gpu_memory_utilization": 90}, ["at most 1", "for 90 % write 0.9"]),
    ({"gpu_memory_utilization": float("nan")}, ["greater than 0 and at most 1"]),
    ({"kv_cache_memory_bytes": -1}, ["greater than 0"]),
    ({"kv_cache_memory_bytes": "1X"}, ["no amount of memory", "2GiB", "1K is 1024"]),
    ({"kv_cache_memory_bytes": 1 << 60}, ["memory that are free here", "use less than", "leave it out"]),
    ({"num_gpu_blocks_override": 0}, ["greater than 0"]),
    ({"max_num_seqs": 0}, ["greater than 0"]),
    ({"max_num_batched_tokens": 0}, ["greater than 0"]),
    ({"max_num_batched_tokens": 8, "max_num_seqs": 9}, ["max_num_seqs=9", "raise the budget to 9"]),
    ({"max_num_batched_tokens": 64, "enable_chunked_prefill": False}, [f"max_model_len={LIMIT}", "chunked prefill"]),
    ({"scheduling_policy": "lifo"}, ["not one of fcfs, priority"]),
]


@pytest.mark.parametrize(("settings", "words"), BROKEN, ids=[" ".join(f"{k}={v}" for k, v in s.items()) for s, _ in BROKEN])
def test_broken_rule_is_refused_with_setting_value_rule_and_remedy(model: str, settings: dict[str, object], words: list[str]) -> None:
    with pytest.raises(ConfigError) as refused:
        resolve(build_config(model=model, **settings))
    name, value = next(iter(settings.items()))
    message = str(refused.value)
    assert f"{name}={value!r}" in message or f"{name}={value}" in message
    for word in words:
        assert word in message


def test_what_is_automatic_is_filled(model: str) -> None:
    config, spec, folder = resolve(build_config(model=model))
    assert (config.model.dtype, config.runtime.device) == ("bfloat16", "cpu")  # auto is the checkpoint's own type
    assert config.model.max_model_len == LIMIT
    assert config.parallel.distributed_executor_backend == "uni"
    assert config.parallel.threads_per_rank is None  # shared out where the ranks start: shares may differ
    assert config.cache.gpu_memory_utilization == 0.5
    assert (spec.num_heads, folder) == (HEADS, Path(model))


def test_more_ranks_than_one_run_as_processes(model: str) -> None:
    config, _, _ = resolve(build_config(model=model, tensor_parallel_size=3))
    assert config.parallel.distributed_executor_backend == "mp"


def test_explicit_settings_stay(model: str) -> None:
    chosen = {
        "dtype": "bfloat16",
        "max_model_len": 64,
        "distributed_executor_backend": "mp",
        "threads_per_rank": 1,
        "gpu_memory_utilization": 0.25,
        "max_num_seqs": 3,
        "block_size": 1,
    }
    config, _, _ = resolve(build_config(model=model, **chosen))
    for name, value in chosen.items():
        assert value in (getattr(part, name, None) for part in (config.model, config.parallel, config.cache, config.scheduler)), name


def test_cuda_takes_the_checkpoints_dtype_and_counts_devices(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "cuda_device_count", lambda: 2)
    monkeypatch.setattr(devices, "torch_has_cuda", lambda: True)
    config, _, _ = resolve(build_config(model=model, tensor_parallel_size=2))
    assert (config.runtime.device, config.model.dtype, config.cache.gpu_memory_utilization) == ("cuda", "bfloat16", 0.9)
    with pytest.raises(ConfigError, match=r"tensor_parallel_size=3 .* 2 CUDA device"):
        resolve(build_config(model=model, tensor_parallel_size=3))
    config, _, _ = resolve(build_config(model=model, tensor_parallel_size=3, device="cpu"))
    assert config.runtime.device == "cpu"


def test_a_cpu_build_of_torch_never_means_cuda(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "cuda_device_count", lambda: 2)
    monkeypatch.setattr(devices, "torch_has_cuda", lambda: False)
    assert resolve(build_config(model=model))[0].runtime.device == "cpu"
    with pytest.raises(ConfigError, match="built without CUDA"):
        resolve(build_config(model=model, device="cuda"))


def test_more_ranks_than_cores_is_a_warning(model: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(validate, "usable_cpus", lambda: 1)
    monkeypatch.setattr(logging.getLogger("lockstep"), "propagate", True)
    with caplog.at_level(logging.WARNING, logger="lockstep.config"):
        resolve(build_config(model=model, tensor_parallel_size=2))
    assert "more than the 1 CPU core" in caplog.text


@pytest.mark.parametrize(
    ("tp", "threads", "quota", "words"),
    [
        (1, 64, None, "threads_per_rank=64 on 1 rank makes 64 threads, more than the 4 CPUs here: .* use at most 4,"),
        (2, 3, None, "threads_per_rank=3 on 2 ranks makes 6 threads, more than the 4 CPUs here: .* use at most 2,"),
        (1, 2, 1.5, "threads_per_rank=2 on 1 rank makes 2 threads, more than the 1.5 CPUs here: .* use at most 1,"),
        (2, 2, 8.0, None),
        (1, None, 0.5, None),
    ],
)
def test_more_threads_than_cores_is_a_warning(
    tp: int,
    threads: int | None,
    quota: float | None,
    words: str | None,
    model: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(validate, "usable_cpus", lambda: 4)
    monkeypatch.setattr(validate, "quota", lambda: quota)
    monkeypatch.setattr(logging.getLogger("lockstep"), "propagate", True)
    with caplog.at_level(logging.WARNING, logger="lockstep.config"):
        resolve(build_config(model=model, tensor_parallel_size=tp, threads_per_rank=threads))
    assert re.search(words, caplog.text) if words else not caplog.text


def test_the_kv_cache_of_all_ranks_must_be_in_the_hosts_memory(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(validate, "host_available_bytes", lambda: 1 << 30)
    resolve(build_config(model=model, kv_cache_memory_bytes="1GiB"))
    with pytest.raises(ConfigError, match=r"\(1\.0 GiB\) on each of 2 ranks is more than the 1\.0 GiB .* less than 512\.0 MiB"):
        resolve(build_config(model=model, kv_cache_memory_bytes="1GiB", tensor_parallel_size=2))


def test_quantized_checkpoint_is_refused_by_its_method(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path / "q", quantization_config={"quant_method": "awq"})
    with pytest.raises(ConfigError, match=r"quantized \(awq\)"):
        resolve(build_config(model=str(folder), device="cpu"))


def test_checkpoint_without_safetensors_is_refused_unless_weights_are_dummies(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path / "bare")
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(ConfigError, match=r"no \*\.safetensors.*pickles.*load_format dummy"):
        resolve(build_config(model=str(folder), device="cpu"))
    assert resolve(build_config(model=str(folder), device="cpu", load_format="dummy"))[2] == folder


def test_the_given_tree_is_left_alone(model: str) -> None:
    given = build_config(model=model)
    resolve(given)
    assert given == build_config(model=model)


def test_the_token_budget_adapts_to_a_small_machine(monkeypatch, tmp_path):
    """2048 where there is room; halved down to 512 where one step's activations would take over a sixteenth of the memory."""
    from lockstep.config import validate

    def budget(available_bytes: int) -> int | None:
        monkeypatch.setattr(validate, "host_available_bytes", lambda: available_bytes)
        return validate.fill(EngineConfig(), spec, "cpu").scheduler.max_num_batched_tokens

    spec = ModelSpec("LlamaForCausalLM", 4096, 2, 32, 8, 128, 14336, 32000, 4096, layer_kinds=("full", "full"))
    assert [budget(gib << 30) for gib in (64, 12, 4, 2)] == [2048, 1024, 512, 512]


def test_collectives_are_compared_where_the_flag_or_the_environment_says_so(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LOCKSTEP_CHECK_COLLECTIVES", raising=False)
    assert not resolve(build_config(model=model))[0].parallel.check_collectives
    assert resolve(build_config(model=model, check_collectives=True))[0].parallel.check_collectives
    monkeypatch.setenv("LOCKSTEP_CHECK_COLLECTIVES", "1")
    assert resolve(build_config(model=model))[0].parallel.check_collectives


@pytest.mark.parametrize(
    ("settings", "environment", "words"),
    [
        ({"master_addr": "10.0.0.1"}, {}, "master_addr and master_port have no effect: nnodes=1"),
        ({"data_parallel_size": 2, "data_parallel_address": "10.0.0.1"}, {}, "data_parallel_address=10.0.0.1 has no effect"),
        ({}, {"RANK": "0", "WORLD_SIZE": "2"}, "torchrun started 2 of this program"),
        ({}, {"RANK": "0", "WORLD_SIZE": "1"}, ""),
        ({"data_parallel_size": 2, "data_parallel_size_local": 1, "data_parallel_address": "10.0.0.1"}, {}, ""),
    ],
)
def test_settings_without_effect_are_a_warning(
    model: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    settings: dict[str, object],
    environment: dict[str, str],
    words: str,
) -> None:
    monkeypatch.setattr(validate, "usable_cpus", lambda: 8)
    monkeypatch.setattr(logging.getLogger("lockstep"), "propagate", True)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with caplog.at_level(logging.WARNING, logger="lockstep.config"):
        resolve(build_config(model=model, **settings))
    assert words in caplog.text if words else not caplog.text
