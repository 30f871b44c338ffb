"""Flags that users of the ecosystem know and this version does not have: refused by name, with what to do instead."""

from __future__ import annotations

from lockstep.cli.errors import UsageError

_LATER = "is not available yet in this version"
_DP = f"keeping replicas in step (for expert parallelism) {_LATER}: leave it out"
_ENDPOINTS = (
    "one server with a port for each replica is not available in this version: start a server for each (--data-parallel-rank), or one for "
    "all of a host (--data-parallel-hybrid-lb of `lockstep serve`), or one for all there are (none of these)"
)
_EP = f"expert parallelism {_LATER}: leave it out"
_CP = f"context parallelism {_LATER}: leave it out"
_LORA = f"LoRA {_LATER}: merge the adapter into the model first"
_SPEC = f"speculative decoding {_LATER}: leave it out"
_QUANT = f"this kind of quantization {_LATER}: use --quantization int8 for the weights, or leave it out"

UNAVAILABLE: dict[str, str] = {
    **dict.fromkeys(
        ("--data-parallel-multi-port-external-lb", "-dpm"),
        _ENDPOINTS,
    ),
    **dict.fromkeys(("--dp-sync-interval", "--disable-nccl-for-dp-synchronization"), _DP),
    **dict.fromkeys(
        (
            *("--enable-ep-weight-filter", "--all2all-backend", "--enable-eplb", "--eplb-config", "--expert-placement-strategy"),
            *("--enable-dbo", "--ubatch-size", "--dbo-decode-token-threshold", "--dbo-prefill-token-threshold"),
            *("--enable-elastic-ep", "--elastic-ep-max-dp-size"),
        ),
        _EP,
    ),
    **dict.fromkeys(("--dcp-comm-backend", "--dcp-kv-cache-interleave-size", "--cp-kv-cache-interleave-size", "--dcp-q-replicate"), _CP),
    **dict.fromkeys(("--enable-lora", "--lora-modules", "--max-loras", "--max-lora-rank"), _LORA),
    **dict.fromkeys(("--speculative-config", "--speculative-model", "--num-speculative-tokens"), _SPEC),
    **dict.fromkeys(("--kv-cache-dtype", "--load-in-4bit", "--load-in-8bit"), _QUANT),
    **dict.fromkeys(("--numa-bind", "--numa-bind-nodes", "--numa-bind-cpus"), f"binding to NUMA nodes {_LATER}: see --cpu-binding"),
    **dict.fromkeys(
        ("--cpu-offload-gb", "--swap-space"), f"offloading {_LATER}: raise --tensor-parallel-size to need less memory per rank"
    ),
    "--disable-custom-all-reduce": "the library's all-reduce is the only one in this version: leave it out",
    "--cpu-distributed-timeout-seconds": f"a timeout of its own for CPU groups {_LATER}: use --distributed-timeout-seconds",
    "--max-parallel-loading-workers": "ranks read only their own share of the weights, all at once: leave it out",
    "--enforce-eager": f"CUDA graphs are {_LATER[3:]}, so every step is eager: leave it out",
    "--compilation-config": f"compilation {_LATER}: leave it out",
    "--ray-workers-use-nsight": f"starting ranks under a profiler {_LATER}: leave it out",
    "--worker-cls": f"custom workers are {_LATER[3:]}: leave it out",
    "--worker-extension-cls": f"custom workers are {_LATER[3:]}: leave it out",
    "--trust-remote-code": "code that comes with a checkpoint is never run: leave it out",
    "--chat-template-content-format": f"choosing the content format {_LATER}: leave it out",
    "--config": f"settings from a file {_LATER}: give them as flags",
}


def refuse_unavailable(argv: list[str]) -> None:
    """Raise UsageError for the first flag that this version does not have."""
    for word in argv:
        if word == "--":
            return
        flag = word.split("=", 1)[0]
        flag = flag.replace("_", "-") if flag.startswith("--") else flag
        if flag in UNAVAILABLE:
            raise UsageError(f"{flag}: {UNAVAILABLE[flag]}.")
