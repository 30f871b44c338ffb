"""Every rule of the configuration, in one place.

`resolve` takes the tree as the user wrote it and returns it with every automatic value filled in that does not depend on
the memory found free after loading. Each refusal names the setting, its value, the rule and what to do.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from dataclasses import fields, replace
from pathlib import Path
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from lockstep.config import devices, launcher
from lockstep.config.build import GROUPS, is_size, nearest
from lockstep.config.defaults import MEMORY_SHARE, Choice, choose_backend, default_backend, default_token_budget
from lockstep.config.errors import ConfigError
from lockstep.config.hf import load_spec
from lockstep.config.model_spec import ModelSpec, read_config_json
from lockstep.config.nodes import check_nodes, placed
from lockstep.config.replicas import check_replicas
from lockstep.config.source import find_folder
from lockstep.config.stages import check_stages
from lockstep.config.tree import EngineConfig, ModelConfig, ParallelConfig, RuntimeConfig
from lockstep.utils import env
from lockstep.utils.cores import quota, usable_cpus
from lockstep.utils.host_memory import host_available_bytes
from lockstep.utils.sizes import size

log = logging.getLogger("lockstep.config")

BACKENDS = ("uni", "mp", "ray", "external_launcher")
MAX_BLOCK_SIZE = 1024
POSITIVE = (
    "tensor_parallel_size",
    "pipeline_parallel_size",
    "data_parallel_size",
    "prefill_context_parallel_size",
    "decode_context_parallel_size",
    "nnodes",
    "node_timeout_seconds",
    "distributed_timeout_seconds",
    "execute_model_timeout_seconds",
    "startup_timeout_seconds",
    "threads_per_rank",
    "max_model_len",
    "block_size",
    "kv_cache_memory_bytes",
    "num_gpu_blocks_override",
    "max_num_seqs",
    "max_num_batched_tokens",
)
# Parallelism that the ecosystem has and this version does not: refused by name, never ignored.
MISSING_PARALLELISM = {
    "prefill_context_parallel_size": "prefill context parallelism",
    "decode_context_parallel_size": "decode context parallelism",
}


def resolve(config: EngineConfig, *, headless: bool = False, hybrid: bool = False) -> tuple[EngineConfig, ModelSpec, Path]:
    """Check the whole tree, find the model, and fill what is automatic.

    Returns the frozen result, the model's numbers and its folder. Raises ConfigError for the first rule that is broken.
    `headless`: this process serves a leader on another host. `hybrid`: it is an endpoint for its host's replicas.
    """
    check_values(config)
    choice = automatic_backend(config)
    is_surprise = choice.value == "ray" and config.parallel.distributed_executor_backend is None  # nobody asked for a cluster
    config = with_backend(config)
    device, spec, folder = check(config, headless=headless, hybrid=hybrid)
    config = replace(config, parallel=placed(config.parallel, headless=headless))
    warn_of_crowding(config.parallel, device)
    warn_of_launcher(config.parallel, headless=headless)
    log.log(logging.WARNING if is_surprise else logging.INFO, "distributed_executor_backend is %s: %s", *choice)
    return fill(config, spec, device), spec, folder


def check(config: EngineConfig, *, headless: bool = False, hybrid: bool = False) -> tuple[Literal["cpu", "cuda"], ModelSpec, Path]:
    """The device, the model's numbers and its folder, every rule checked. Raises ConfigError for the first that is broken."""
    check_values(config)
    config = with_backend(config)
    check_available(config.parallel)
    check_nodes(config.parallel, headless=headless)
    config = replace(config, parallel=placed(config.parallel, headless=headless))
    check_replicas(config.parallel, headless=headless and config.parallel.nodes_per_replica == 1, hybrid=hybrid)
    if launcher.is_external(config.parallel):
        launcher.place(config.parallel)
    device = pick_device(config.runtime, config.parallel)
    if not launcher.is_ray(config.parallel):
        check_room(config.cache.kv_cache_memory_bytes, launcher.ranks_here(config.parallel), device)
    folder = find_folder(config.model.model, config.model.revision)
    check_checkpoint(config.model, folder)
    spec = load_spec(folder)
    check_model_fits(config, spec)
    return device, spec, folder


def automatic_backend(config: EngineConfig) -> Choice:
    """The backend for `config` on this machine."""
    cuda = devices.cuda_device_count() if config.runtime.device != "cpu" else 0
    address = env.ray_address()
    known = bool(address) and address != "local" and not address.startswith("ray://") and launcher.has_ray()
    return choose_backend(config.parallel, cuda or usable_cpus(), launcher.in_ray_group(), known)


def with_backend(config: EngineConfig) -> EngineConfig:
    """`config` with ray for its backend, where that is the automatic one: rules differ then. Others are filled in later."""
    choice = automatic_backend(config)
    if choice.value != "ray":
        return config
    return replace(config, parallel=replace(config.parallel, distributed_executor_backend="ray"))


def settings(config: EngineConfig) -> Iterator[tuple[str, Any, Any]]:
    """(name, type, value) of every field of the tree."""
    for group, cls in GROUPS.items():
        hints, part = get_type_hints(cls), getattr(config, group)
        for f in fields(cls):
            yield f.name, hints[f.name], getattr(part, f.name)


def check_values(config: EngineConfig) -> None:
    """The rules that need neither the model nor the machine."""
    for name, hint, value in settings(config):
        _check_type(name, hint, value)
        if name in POSITIVE and value is not None and not (value > 0 and math.isfinite(value)):
            default = "leave it out for the automatic value" if type(None) in get_args(hint) else "1 is the smallest"
            raise ConfigError(f"{name}={value} is impossible: it must be greater than 0; {default}.")
    cache, sched = config.cache, config.scheduler
    if not 0 <= config.model.seed < 2**63:
        raise ConfigError(f"seed={config.model.seed} is out of range: it must be from 0 to 2**63 - 1.")
    if cache.block_size & (cache.block_size - 1) or cache.block_size > MAX_BLOCK_SIZE:
        low = 1 << min(cache.block_size.bit_length() - 1, MAX_BLOCK_SIZE.bit_length() - 1)
        raise ConfigError(f"block_size={cache.block_size} is not a power of two from 1 to {MAX_BLOCK_SIZE}: use {low}.")
    share = cache.gpu_memory_utilization
    if share is not None and not 0 < share <= 1:
        hint_text = f" (for {share:g} % write {share / 100:g})" if 1 < share <= 100 else ""
        raise ConfigError(f"gpu_memory_utilization={share} must be greater than 0 and at most 1{hint_text}.")
    budget, seqs = sched.max_num_batched_tokens, sched.max_num_seqs
    if budget is not None and seqs is not None and budget < seqs:
        raise ConfigError(
            f"max_num_batched_tokens={budget} is less than max_num_seqs={seqs}: each running request takes at least one token of a step; "
            f"raise the budget to {seqs} or lower max_num_seqs to {budget}."
        )


def _check_type(name: str, hint: Any, value: Any) -> None:
    allowed = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
    if any(_fits(a, value) for a in allowed):
        return
    choices = [c for a in allowed if get_origin(a) is Literal for c in get_args(a)]
    if choices:
        raise ConfigError(f"{name}={value!r} is not one of {', '.join(map(str, choices))}.{nearest(str(value), choices)}")
    if is_size(name) and isinstance(value, str):
        raise ConfigError(
            f"{name}={value!r} is no amount of memory: write bytes, or a number with K, M, G or T (1K is 1024), like 512M or 2GiB."
        )
    words = " or ".join(sorted("None" if a is type(None) else a.__name__ for a in allowed))
    raise ConfigError(f"{name}={value!r} has the wrong type {type(value).__name__}: it must be {words}.")


def _fits(hint: Any, value: Any) -> bool:
    if get_origin(hint) is Literal:
        return isinstance(value, str) and value in get_args(hint)
    if isinstance(value, bool):
        return hint is bool
    return isinstance(value, (int, float) if hint is float else hint)


def check_available(parallel: ParallelConfig) -> None:
    """Refuse by name what this version does not have; then the rules between the parallel settings."""
    for name, words in MISSING_PARALLELISM.items():
        launched = name == "data_parallel_size" and launcher.is_external(parallel)  # replicas that the launcher starts
        if getattr(parallel, name) > 1 and not launched:
            raise ConfigError(
                f"{name}={getattr(parallel, name)}: {words} is not available yet in this version; "
                f"use tensor_parallel_size to split the model, and leave {name} at 1."
            )
    if parallel.enable_expert_parallel:
        raise ConfigError(
            "enable_expert_parallel=True: expert parallelism is not available yet in this version; "
            "leave it out, and use tensor_parallel_size to split the model."
        )
    backend = parallel.distributed_executor_backend
    if backend is None:
        return
    if backend not in BACKENDS:
        raise ConfigError(
            f"distributed_executor_backend={backend!r} is unknown: choose one of auto, {', '.join(BACKENDS)}.{nearest(backend, BACKENDS)}"
        )
    if backend == "ray" and not launcher.has_ray():
        raise ConfigError(
            "distributed_executor_backend='ray' needs Ray, which is not installed here: pip install 'lockstep[ray]', the same version on "
            "every node of the cluster; or use mp."
        )
    if backend == "uni" and parallel.world_size > 1:
        alone = replace(parallel, data_parallel_size=1)
        raise ConfigError(f"distributed_executor_backend='uni' runs one rank, but {sizes(alone)}: use mp.")


def sizes(parallel: ParallelConfig) -> str:
    """The sizes that multiply to more than one rank, in words."""
    named = ["tensor_parallel_size", "pipeline_parallel_size"]
    if not parallel.in_groups:
        elsewhere = parallel.local_replicas < parallel.data_parallel_size
        named.append("data_parallel_size_local" if elsewhere else "data_parallel_size")
    return " and ".join(f"{n}={getattr(parallel, n)}" for n in named if getattr(parallel, n) > 1) or f"{named[0]}=1"


def pick_device(runtime: RuntimeConfig, parallel: ParallelConfig) -> Literal["cpu", "cuda"]:
    """The device the ranks run on. Raises ConfigError when it is not there, or has fewer devices than ranks."""
    found, ranks = devices.cuda_device_count(), launcher.ranks_here(parallel)
    if launcher.is_ray(parallel) or not ranks:
        return "cuda" if runtime.device == "cuda" or (runtime.device == "auto" and found and devices.torch_has_cuda()) else "cpu"
    if runtime.device == "cuda":
        if found == 0:
            raise ConfigError(
                "device='cuda': no CUDA device is visible to this process (see CUDA_VISIBLE_DEVICES); use device cpu or auto."
            )
        if not devices.torch_has_cuda():
            raise ConfigError("device='cuda': the installed torch is built without CUDA; install a CUDA build, or use device cpu or auto.")
    device: Literal["cpu", "cuda"] = "cuda" if runtime.device != "cpu" and found and devices.torch_has_cuda() else "cpu"
    if device == "cuda" and ranks > found:
        product = f" make {ranks} ranks," if " and " in sizes(parallel) or parallel.nnodes > 1 else " is"
        product = product.replace(",", " on this host,") if parallel.nnodes > 1 else product
        alone = parallel.data_parallel_rank is not None and parallel.local_replicas > 1 and not launcher.is_external(parallel)
        fewer = " Replicas that run on other hosts do not count once data_parallel_size_local says how many run here." if alone else ""
        raise ConfigError(
            f"{sizes(parallel)}{product} more than the {found} CUDA device(s) visible here: use at most {found}, or device cpu.{fewer}"
        )
    return device


def check_room(kv_bytes: int | None, ranks: int, device: str) -> None:
    """The KV caches asked for are not more than the host's memory. (A GPU's is known when the ranks have started.)"""
    if kv_bytes is None or device != "cpu":
        return
    free = host_available_bytes()
    if kv_bytes * ranks > free:
        each = f" on each of {ranks} ranks" if ranks > 1 else ""
        raise ConfigError(
            f"kv_cache_memory_bytes={kv_bytes} ({size(kv_bytes)}){each} is more than the {size(free)} of memory that are free here: "
            f"use less than {size(free // ranks)}, or leave it out for the automatic value."
        )


def warn_of_launcher(parallel: ParallelConfig, *, headless: bool = False) -> None:
    """Settings that have no effect, where somebody meant them to."""
    started = env.torchrun_rank()
    if started is not None and started[2] > 1 and not launcher.is_external(parallel):
        log.warning(
            "torchrun started %d of this program, and each runs a whole engine by itself: for one engine over all of them set "
            "distributed_executor_backend=external_launcher.",
            started[2],
        )
    defaults = ParallelConfig()
    if parallel.nnodes == 1 and (parallel.master_addr, parallel.master_port) != (defaults.master_addr, defaults.master_port):
        log.warning("master_addr and master_port have no effect: nnodes=1 is this host alone. Set nnodes to use several.")
    elsewhere = headless or parallel.replicas_led < parallel.replicas_served
    if not elsewhere and parallel.data_parallel_address != defaults.data_parallel_address:
        log.warning(
            "data_parallel_address=%s has no effect: all %d replica(s) run here. Set data_parallel_size_local to keep some elsewhere.",
            *(parallel.data_parallel_address, parallel.replicas_served),
        )


def warn_of_crowding(parallel: ParallelConfig, device: str) -> None:
    """More ranks or threads than cores is right but slow: said once everything else holds."""
    if device != "cpu" or launcher.is_ray(parallel) or (launcher.is_external(parallel) and launcher.place(parallel).local_rank):
        return  # the first rank of a host speaks for all
    ranks, threads, cores = launcher.ranks_here(parallel), parallel.threads_per_rank or 1, usable_cpus()
    cpus = min(cores, quota() or cores)
    if threads > 1 and ranks * threads > cpus:
        log.warning(
            "threads_per_rank=%d on %d rank%s makes %d threads, more than the %g CPUs here: they will take turns, and be slow; "
            "use at most %d, or leave it out.",
            *(threads, ranks, "s" if ranks > 1 else "", ranks * threads, cpus, max(1, int(cpus / ranks))),
        )
    elif ranks > cores:
        product = f"make {ranks} ranks, " if " and " in sizes(parallel) or parallel.nnodes > 1 else "is "
        log.warning("%s %smore than the %d CPU cores: ranks will take turns, and be slow.", sizes(parallel), product, cores)


def check_checkpoint(model: ModelConfig, folder: Path) -> None:
    """The folder holds a checkpoint this version can read."""
    raw = read_config_json(folder)
    method = (raw.get("quantization_config") or {}).get("quant_method")
    if method:
        raise ConfigError(f"model={model.model!r} is quantized ({method}), which is not available yet: name an unquantized checkpoint.")
    if model.load_format != "dummy" and not any(folder.glob("*.safetensors")):
        other = " (its *.bin weights are pickles, which are never loaded)" if any(folder.glob("*.bin")) else ""
        raise ConfigError(
            f"model={model.model!r}: {folder} has no *.safetensors{other}: "
            "name a checkpoint with them, or use load_format dummy for random weights."
        )


def check_model_fits(config: EngineConfig, spec: ModelSpec) -> None:
    """The rules between the settings and the model's own numbers."""
    tp, length, limit = config.parallel.tensor_parallel_size, config.model.max_model_len, spec.max_position_embeddings
    if tp > spec.num_heads:
        raise ConfigError(
            f"tensor_parallel_size={tp} is more than the model's {spec.num_heads} attention heads, and each rank needs one: "
            f"use at most {spec.num_heads}."
        )
    if tp > spec.intermediate_size:
        raise ConfigError(
            f"tensor_parallel_size={tp} is more than the model's {spec.intermediate_size} MLP columns: "
            f"use at most {spec.intermediate_size}."
        )
    check_stages(spec.num_layers, config.parallel.pipeline_parallel_size, config.parallel.pipeline_layer_partition)
    if length is not None and length > limit:
        raise ConfigError(f"max_model_len={length} is more than the model's own limit of {limit} positions: use at most {limit}.")
    length = length or limit
    budget = config.scheduler.max_num_batched_tokens
    if not config.scheduler.enable_chunked_prefill and budget is not None and budget < length:
        raise ConfigError(
            f"max_num_batched_tokens={budget} is less than max_model_len={length} while enable_chunked_prefill=False: a long prompt could "
            f"never run; raise the budget to {length}, lower max_model_len to {budget}, or allow chunked prefill."
        )
    if config.model.dtype == "float16" and spec.architecture.startswith("Gemma"):
        raise ConfigError(f"dtype='float16' overflows in {spec.architecture}: use bfloat16 or float32.")


def fill(config: EngineConfig, spec: ModelSpec, device: Literal["cpu", "cuda"]) -> EngineConfig:
    """The tree with every automatic value filled in that can be known before the ranks have loaded the model."""
    parallel, model, cache = config.parallel, config.model, config.cache
    external = launcher.is_external(parallel)
    share = cache.gpu_memory_utilization or MEMORY_SHARE[device]
    dtype: Any = model.dtype if model.dtype != "auto" else spec.dtype
    config = replace(
        config,
        model=replace(
            model,
            dtype=dtype,
            max_model_len=model.max_model_len or spec.max_position_embeddings,
        ),
        parallel=replace(
            parallel,
            distributed_executor_backend=default_backend(parallel),
            data_parallel_rank=launcher.place(parallel).replica if external else parallel.data_parallel_rank,
            check_collectives=parallel.check_collectives or env.check_collectives(),
        ),
        cache=replace(cache, gpu_memory_utilization=share),
        runtime=replace(config.runtime, device=device),
    )
    # A GPU's memory cannot be asked for without torch; the ranks profile a step of this size there before anything else.
    # Engines that must plan alike, each from its own look at the memory that is free just then, do not look at all.
    room = int(share * host_available_bytes()) // max(1, launcher.ranks_here(parallel)) if device == "cpu" and not external else None
    budget = default_token_budget(config, spec, room)
    return replace(config, scheduler=replace(config.scheduler, max_num_batched_tokens=budget))
