"""One engine whose ranks were started by torchrun: every process runs this file, and is one rank.

    torchrun --nproc-per-node=2 examples/torchrun_tp.py [MODEL]

Nobody sends work to the ranks here. Each makes the same plan from the same prompts, so all must be given the same
prompts, parameters and seed, and all get the same outputs. For training loops that generate between their steps.
"""

from __future__ import annotations

import argparse
import os
import sys

from lockstep import LLM, SamplingParams

PROMPTS = ["def fibonacci(n):", "import ", "class Stack:", "for i in range("]


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="", help="a folder or hub id; without it the embedded demo model")
    parser.add_argument("--max-tokens", type=int, default=32, help="most tokens of a completion (default: 32)")
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
        sys.exit("RANK and WORLD_SIZE are not set: start this with torchrun --nproc-per-node=2 examples/torchrun_tp.py")
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    sampling = SamplingParams(temperature=0, max_tokens=args.max_tokens)
    with LLM(args.model, tensor_parallel_size=world_size, distributed_executor_backend="external_launcher", seed=1) as llm:
        outputs = llm.generate(PROMPTS, sampling, use_tqdm=rank == 0)
    if rank == 0:  # the others hold the very same
        for output in outputs:
            print(f"{output.prompt!r} -> {output.outputs[0].text!r}")


if __name__ == "__main__":
    main()
