"""Several engines under one torchrun: each group of TP ranks is an engine of its own, with its own share of the prompts.

    torchrun --nproc-per-node=4 examples/torchrun_dp.py -tp 2 [MODEL]       # 4 processes, 2 engines

Engine d of D completes the prompts whose number is d modulo D. Within an engine all ranks see the same prompts.
"""

from __future__ import annotations

import argparse
import os
import sys

from lockstep import LLM, SamplingParams

PROMPTS = [f"def add_{number}(x):" for number in range(8)]


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="", help="a folder or hub id; without it the embedded demo model")
    parser.add_argument("-tp", "--tensor-parallel-size", type=int, default=1, help="ranks of each engine (default: 1)")
    parser.add_argument("--max-tokens", type=int, default=32, help="most tokens of a completion (default: 32)")
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
        sys.exit("RANK and WORLD_SIZE are not set: start this with torchrun --nproc-per-node=2 examples/torchrun_dp.py")
    rank, world_size, tp = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), args.tensor_parallel_size
    if tp < 1 or world_size % tp:
        sys.exit(f"--tensor-parallel-size={tp} does not divide the {world_size} processes that torchrun started: change either.")
    dp = world_size // tp
    sampling = SamplingParams(temperature=0, max_tokens=args.max_tokens)
    with LLM(args.model, tensor_parallel_size=tp, data_parallel_size=dp, distributed_executor_backend="external_launcher", seed=1) as llm:
        dp_rank = llm.config.parallel.data_parallel_rank
        mine = [prompt for i, prompt in enumerate(PROMPTS) if i % dp == dp_rank]
        outputs = llm.generate(mine, sampling, use_tqdm=rank == 0)
    if rank % tp == 0:  # one rank of each engine: the tensor-parallel ranks of an engine are neighbours
        for output in outputs:
            print(f"engine {dp_rank}: {output.prompt!r} -> {output.outputs[0].text!r}")


if __name__ == "__main__":
    main()
