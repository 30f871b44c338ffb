"""openvino-genai's continuous batching as a child of the harness; runs in that package's own Python, in one process.

Settings of its own: `kv=u8` stores the KV cache in 8 bits; by default it has the run's dtype, as for everybody.
"""

from __future__ import annotations

from typing import Any

from serve import Channel, serve, settings

_NAMES = {"bfloat16": "bf16", "float32": "f32", "float16": "f16"}


def main() -> None:
    channel, run = Channel(), settings()
    import numpy as np
    import openvino
    import openvino_genai as genai

    dtype, more = _NAMES[run["dtype"]], dict(run["more"])
    scheduler = genai.SchedulerConfig()
    scheduler.cache_size = max(1, run["kv_bytes"] >> 30)  # GiB
    scheduler.max_num_seqs = run["max_num_seqs"]
    scheduler.max_num_batched_tokens = run["max_num_batched_tokens"]
    scheduler.enable_prefix_caching = run["prefix_caching"]
    scheduler.dynamic_split_fuse = True
    properties = {
        "INFERENCE_NUM_THREADS": run["threads"],
        "INFERENCE_PRECISION_HINT": dtype,
        "KV_CACHE_PRECISION": more.pop("kv", dtype),
        "PERFORMANCE_HINT": "LATENCY",
        "ENABLE_CPU_PINNING": True,
        **more,
    }
    pipeline = genai.ContinuousBatchingPipeline(run["openvino_model"], scheduler, "CPU", properties)

    def config(tokens: int) -> Any:
        chosen = genai.GenerationConfig()
        chosen.max_new_tokens, chosen.ignore_eos, chosen.do_sample = tokens, True, False
        return chosen

    def generate(prompts: list[list[int]], outs: list[int]) -> list[list[int]]:
        inputs = [openvino.Tensor(np.array([p], dtype=np.int64)) for p in prompts]
        results = pipeline.generate(inputs, [config(n) for n in outs])
        return [list(r.m_generation_ids[0]) for r in results]

    serve(channel, {"version": genai.__version__, "dtype": run["dtype"]}, generate)


if __name__ == "__main__":
    main()
