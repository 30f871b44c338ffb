"""Complete prompts with one model split over the ranks of this host.

    python examples/offline_tp.py                          # the embedded demo model on two ranks
    python examples/offline_tp.py ./my-llama -tp 4

The completions do not depend on how many ranks there are: try -tp 1.
"""

from __future__ import annotations

import argparse

from lockstep import LLM, SamplingParams

PROMPTS = ["def fibonacci(n):", "import ", "class Stack:", "for i in range("]


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="", help="a folder or hub id; without it the embedded demo model")
    parser.add_argument("-tp", "--tensor-parallel-size", type=int, default=2, help="ranks that share each layer (default: 2)")
    parser.add_argument("--max-tokens", type=int, default=32, help="most tokens of a completion (default: 32)")
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    sampling = SamplingParams(temperature=0, max_tokens=args.max_tokens)
    with LLM(args.model, tensor_parallel_size=args.tensor_parallel_size) as llm:
        for output in llm.generate(PROMPTS, sampling):
            print(f"{output.prompt!r} -> {output.outputs[0].text!r}")


if __name__ == "__main__":
    main()
