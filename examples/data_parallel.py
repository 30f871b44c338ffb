"""Complete prompts with several replicas of one model on this host, each split over ranks of its own.

    python examples/data_parallel.py                       # two replicas of the demo model, two ranks each
    python examples/data_parallel.py ./my-llama -tp 1 -dp 4

Replicas share out the prompts among themselves; the outputs come in the prompts' order all the same.
A program that starts a process for each replica itself gives each LLM its data_parallel_rank, and where not all of them are on one
host also data_parallel_size_local: how many share this one's cores and devices.
"""

from __future__ import annotations

import argparse

from lockstep import LLM, SamplingParams

PROMPTS = [f"def add_{number}(x):" for number in range(8)]


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="", help="a folder or hub id; without it the embedded demo model")
    parser.add_argument("-tp", "--tensor-parallel-size", type=int, default=2, help="ranks of each replica (default: 2)")
    parser.add_argument("-dp", "--data-parallel-size", type=int, default=2, help="replicas of the model (default: 2)")
    parser.add_argument("--max-tokens", type=int, default=32, help="most tokens of a completion (default: 32)")
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    sampling = SamplingParams(temperature=0, max_tokens=args.max_tokens)
    with LLM(args.model, tensor_parallel_size=args.tensor_parallel_size, data_parallel_size=args.data_parallel_size) as llm:
        for output in llm.generate(PROMPTS, sampling):
            print(f"{output.prompt!r} -> {output.outputs[0].text!r}")


if __name__ == "__main__":
    main()
