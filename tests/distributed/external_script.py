"""The user's program of the torchrun tests: `external_script.py JOB FOLDER`; each rank writes what it got to FOLDER."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import msgspec

from lockstep.llm import LLM
from lockstep.protocol import SamplingParams


def outputs(llm: LLM, prompts: list[Any], params: dict[str, Any]) -> list[Any]:
    """All that a user can see of the outputs, as plain data."""
    done = llm.generate(prompts, SamplingParams(**params), use_tqdm=False)
    return [[o.prompt_token_ids, o.prompt_logprobs, [[c.token_ids, c.text, c.logprobs, c.finish_reason] for c in o.outputs]] for o in done]


def live(job: dict[str, Any], settings: dict[str, Any]) -> dict[str, Any]:
    """One LLM's life."""
    with LLM(**job["model"], **settings) as llm:
        parallel = llm.config.parallel
        replicas, mine = parallel.data_parallel_size, parallel.data_parallel_rank or 0
        if job.get("raise") == int(os.environ.get("RANK", "0")):
            llm._client.core.executor._worker.runner.sampler = None  # type: ignore[attr-defined]
        prompts = job["prompts"][mine::replicas]
        return {
            "replica": mine,
            "outputs": [outputs(llm, prompts, params) for params in job["params"]],
            "preemptions": llm.stats().preemptions,
            "pings": llm.collective_rpc("ping"),
            "memory": llm.memory(),
            "blocks": llm.config.cache.num_gpu_blocks_override,
            "depth": llm._client.core.depth,
        }


def main() -> None:
    job = json.loads(Path(sys.argv[1]).read_text())
    lives = [live(job, settings) for settings in job["lives"]]
    Path(sys.argv[2], f"rank{os.environ['RANK']}.json").write_bytes(msgspec.json.encode(lives))


if __name__ == "__main__":
    main()
