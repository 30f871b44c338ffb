"""One frozen configuration tree. The command line's flags and help are generated from these fields.

Each field's `help` is what `--help` prints; `alias` lists short flags. Nothing here is checked: `validate.py` checks
the whole tree in one place and returns it with every `None` that means "automatic" filled in.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

DType = Literal["auto", "float32", "bfloat16", "float16"]
Quantization = Literal["int8"]
Device = Literal["auto", "cpu", "cuda"]
LoadFormat = Literal["auto", "safetensors", "dummy"]
Policy = Literal["fcfs", "priority"]
Routing = Literal["prefix", "shortest_queue", "round_robin"]

NODES_GRACE_S = 10.0  # who waits for hosts times that itself, and names who is late: let it speak first


def opt(default: Any, help: str, *alias: str) -> Any:
    """A config field with its help text (one sentence) and short flags."""
    return field(default=default, metadata={"help": help, "alias": alias})


@dataclass(frozen=True)
class ModelConfig:
    """Which model, and how its weights are read."""

    model: str = opt("", "A local folder or a hub id with a Hugging Face checkpoint; empty means the embedded demo model.")
    tokenizer: str | None = opt(None, "Folder or hub id of the tokenizer, when it is not the model's own.")
    revision: str | None = opt(None, "Branch, tag or commit of the model on the hub.")
    dtype: DType = opt("auto", "Type of weights and activations; auto is the checkpoint's own.")
    quantization: Quantization | None = opt(None, "int8 keeps the layers' matrices in 8 bits, one scale per output (CPU).", "-q")
    max_model_len: int | None = opt(None, "Most tokens of prompt and output of one request; default: the model's own.")
    load_format: LoadFormat = opt("auto", "auto and safetensors read the checkpoint, dummy fills seeded random weights.")
    seed: int = opt(0, "Seed of everything random that no request seeds itself.")


@dataclass(frozen=True)
class ParallelConfig:
    """How the model is split over ranks, and how the ranks are started."""

    tensor_parallel_size: int = opt(1, "Ranks that share each layer's matrices.", "-tp")
    pipeline_parallel_size: int = opt(1, "Stages of consecutive layers.", "-pp")
    pipeline_layer_partition: str | None = opt(
        None, "Layers of each stage: balanced (default: by weights and work), even, reference, or their counts, like 5,6,6,5."
    )
    data_parallel_size: int = opt(1, "Replicas of the whole model.", "-dp")
    data_parallel_rank: int | None = opt(
        None, "Which replica this process is of, where each is started by itself; under external_launcher found from RANK.", "-dpn"
    )
    data_parallel_size_local: int | None = opt(
        None,
        "Replicas that run on this host; default: all of them (a server for one replica: that one). The others run on other hosts; 0: all "
        "do.",
        "-dpl",
    )
    data_parallel_start_rank: int | None = opt(
        None, "The first of this host's replicas, where it runs headless, or with -dph; default: 0.", "-dpr"
    )
    data_parallel_address: str = opt(
        "127.0.0.1", "Address of the leader, which takes the requests, as other hosts with replicas reach it.", "-dpa"
    )
    data_parallel_rpc_port: int = opt(29550, "Port on the leader at which hosts with replicas report.", "-dpp")
    data_parallel_backend: str = opt("mp", "How replicas are started: mp (processes), or ray (on the nodes of a cluster).", "-dpb")
    data_parallel_routing: Routing = opt(
        "prefix", "Where a request goes: prefix (to the replica that has its beginning cached), shortest_queue or round_robin."
    )
    prefill_context_parallel_size: int = opt(1, "Ranks that share one prompt.", "-pcp")
    decode_context_parallel_size: int = opt(1, "Ranks that share one request's KV cache.", "-dcp")
    enable_expert_parallel: bool = opt(False, "Place whole experts on ranks instead of cutting each.", "-ep")
    distributed_executor_backend: str | None = opt(
        None,
        "uni (in this process), mp (worker processes), ray (on a Ray cluster), external_launcher, or auto, the default: uni for one rank, "
        "mp for more, and ray for more where Ray started this program, or RAY_ADDRESS is set and this host has too few devices.",
    )
    nnodes: int = opt(
        1, "Hosts that share the ranks, or the replicas; start the same command on each, with its node_rank (mp only).", "-n", "--node-size"
    )
    node_rank: int = opt(0, "Which of the nnodes hosts this is: 0 is the leader, the others run with --headless.", "-r")
    master_addr: str = opt("127.0.0.1", "Address of node 0, as the other hosts reach it.")
    master_port: int = opt(29501, "Port on node 0 at which the other hosts report.")
    node_timeout_seconds: float = opt(10.0, "A host that gives no sign of life for so long, in seconds, is lost (several hosts only).")
    distributed_timeout_seconds: float = opt(
        300.0, "Longest wait for a collective or for ranks to meet, in seconds (worker processes only)."
    )
    execute_model_timeout_seconds: float = opt(300.0, "Longest time one step may take, in seconds (worker processes only).")
    check_collectives: bool = opt(
        False, "Debug: compare every rank's sequence of collectives and report the first divergence (one rank has none)."
    )
    threads_per_rank: int | None = opt(
        None, "Compute threads of each rank; default: this host's cores shared out evenly, one thread on each."
    )
    cpu_binding: bool = opt(
        True, "Keep each rank on its own cores (one rank in this process: while it computes); `lockstep doctor` shows the plan."
    )

    @property
    def stage_size(self) -> int:
        """Ranks of one pipeline stage."""
        return self.tensor_parallel_size * self.prefill_context_parallel_size

    @property
    def world_size(self) -> int:
        """Ranks of one replica."""
        return self.stage_size * self.pipeline_parallel_size

    @property
    def nodes_per_replica(self) -> int:
        """Of the nnodes hosts, those that the ranks of one replica are on. (Ray places each replica by itself.)"""
        return self.nnodes if self.distributed_executor_backend == "ray" else max(1, self.nnodes // self.data_parallel_size)

    @property
    def in_groups(self) -> bool:
        """Whether the hosts are split into groups of several, one for each replica. All replicas are led from host 0."""
        return 1 < self.nodes_per_replica < self.nnodes

    @property
    def group(self) -> range:
        """The hosts (by node_rank) of the replica that data_parallel_rank names: groups are runs."""
        first = (self.data_parallel_rank or 0) * self.nodes_per_replica if self.in_groups else 0
        return range(first, first + self.nodes_per_replica)

    @property
    def report_port(self) -> int:
        """Port on host 0 at which the hosts of this replica's group report: each group's is one more than the one before."""
        return self.master_port + self.group.start // self.nodes_per_replica

    @property
    def local_world_size(self) -> int:
        """Ranks of one replica on each host."""
        return self.world_size // self.nodes_per_replica

    @property
    def local_ranks(self) -> range:
        """The ranks of a replica on this host: ranks are dealt out to the replica's hosts in runs."""
        first = self.node_rank % self.nodes_per_replica * self.local_world_size
        return range(first, first + self.local_world_size)

    @property
    def local_replicas(self) -> int:
        """Replicas with ranks on this host: they share its cores and its memory."""
        if self.in_groups:
            return 1
        return self.data_parallel_size if self.data_parallel_size_local is None else self.data_parallel_size_local

    @property
    def replicas_led(self) -> int:
        """Replicas whose engine runs on the leader's host; other hosts run that of the others."""
        return self.data_parallel_size if self.in_groups else self.local_replicas

    @property
    def local_replica(self) -> int | None:
        """Which of its host's replicas this one is; None where this is none. Hosts have replicas in runs."""
        rank = self.data_parallel_rank
        return None if rank is None else (rank - (self.data_parallel_start_rank or 0)) % self.local_replicas

    @property
    def first_replica(self) -> int:
        """The number of the first replica behind this process: numbers that anybody sees count all hosts' replicas."""
        return self.data_parallel_rank if self.data_parallel_rank is not None else self.data_parallel_start_rank or 0

    @property
    def replicas_served(self) -> int:
        """Replicas behind this process: all of them, the one that data_parallel_rank names, or its host's where it has an endpoint."""
        if self.data_parallel_rank is not None:
            return 1
        return self.data_parallel_size if self.data_parallel_start_rank is None else self.local_replicas

    @property
    def replica_numbers(self) -> range:
        """Of the replicas behind this process."""
        return range(self.first_replica, self.first_replica + self.replicas_served)

    @property
    def first_device(self) -> int:
        """The device of this replica's first rank on this host: replicas take the host's devices in order."""
        return (self.local_replica or 0) * self.local_world_size

    @property
    def ranks_here(self) -> int:
        """Ranks of all replicas on this host."""
        return self.local_world_size * self.local_replicas


@dataclass(frozen=True)
class CacheConfig:
    """The paged KV cache."""

    block_size: int = opt(16, "Tokens in one KV block.")
    gpu_memory_utilization: float | None = opt(
        None,
        "Share of the device's memory this engine may use, 0 to 1; default 0.9 on CUDA, 0.5 of free memory on CPU.",
        "--device-memory-utilization",
    )
    kv_cache_memory_bytes: int | None = opt(None, "Bytes of KV cache per rank, like 2G or 512MiB (1K is 1024); overrides the share.")
    num_gpu_blocks_override: int | None = opt(None, "Number of KV blocks, for tests of a full cache.")
    enable_prefix_caching: bool = opt(True, "Reuse the KV blocks of prompts that begin alike.")


@dataclass(frozen=True)
class SchedulerConfig:
    """Continuous batching."""

    max_num_seqs: int | None = opt(None, "Most requests in one step; default: adapted to the KV memory, at most 256.")
    max_num_batched_tokens: int | None = opt(
        None, "Most tokens in one step (the budget that prefill and decode share); default: adapted, 512 to 2048 on CPU, at most 8192."
    )
    scheduling_policy: Policy = opt("fcfs", "Order of waiting requests: first come first served, or by priority.")
    enable_chunked_prefill: bool = opt(True, "Split long prompts over steps when the budget is short.")
    async_scheduling: bool = opt(True, "Plan the next step while the ranks run this one.")


@dataclass(frozen=True)
class RuntimeConfig:
    """The machine and the process."""

    device: Device = opt("auto", "cpu, cuda, or auto: cuda when there is one.")
    log_level: Literal["debug", "info", "warning", "error"] = opt("warning", "Least severe log line shown.")
    incident_dir: str | None = opt(
        None, "Folder for incident files, which tell why a rank or a process died; default: incidents in the cache folder."
    )
    startup_timeout_seconds: float = opt(600.0, "Longest time the ranks may take to start, in seconds (worker processes only).")


@dataclass(frozen=True)
class EngineConfig:
    """The whole tree: all that an engine and its ranks need to start."""

    model: ModelConfig = field(default_factory=ModelConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    cache: CacheConfig = field(default_factory=CacheConfig)
    scheduler: SchedulerConfig = field(default_factory=SchedulerConfig)
    runtime: RuntimeConfig = field(default_factory=RuntimeConfig)

    @property
    def start_limit_s(self) -> float:
        """Longest start of a replica, in seconds. Where it is on several hosts they are waited for first, and then, anew, its ranks."""
        limit_s = self.runtime.startup_timeout_seconds
        return limit_s if self.parallel.nodes_per_replica == 1 else 2 * limit_s + NODES_GRACE_S
