"""`lockstep demo`: the main job in a minute. A model split over two ranks writes; one rank alone must write the same."""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING

from lockstep.cli.parser import Parser
from lockstep.cli.session import memory_table
from lockstep.protocol import SamplingParams
from lockstep.utils.interrupt import at_once

if TYPE_CHECKING:
    from lockstep.executor.contract import RankMemory

PROMPTS = [
    "def is_prime(n):\n    if n < 2:",
    "import os\nimport sys\n\ndef main(",
    "class Parser(object):",
]


def run(argv: list[str]) -> int:
    """Exit 0 when the split and the unsplit model wrote the same tokens, 1 when not."""
    parser = Parser(prog="lockstep demo", description=__doc__)
    parser.add_argument("--tensor-parallel-size", "-tp", type=int, default=2, help="ranks that share the model (default 2)")
    parser.add_argument("--pipeline-parallel-size", "-pp", type=int, default=1, help="stages of consecutive layers (default 1)")
    parser.add_argument("--max-tokens", type=int, default=96, help="tokens to write for each prompt (default 96)")
    args = parser.parse_args(argv)
    for name, count in vars(args).items():
        if count < 1:
            parser.error(f"--{name.replace('_', '-')}={count} must be at least 1")
    greedy = SamplingParams(temperature=0, repetition_penalty=1.15, max_tokens=args.max_tokens)
    tp, pp = args.tensor_parallel_size, args.pipeline_parallel_size
    print(f"-- {tp * pp} ranks, each with its share of the demo model --", flush=True)
    split, memory = _write(tp, pp, greedy, show=True)
    print("\n-- the same prompts, not split --", flush=True)
    whole, _ = _write(1, 1, greedy, show=False)
    same = split == whole
    print()
    print(memory_table(memory, exact=True))
    print(f"{_split(tp, pp)} output identical to TP=1: {'yes' if same else 'NO'}")
    return 0 if same else 1


def _split(tp: int, pp: int) -> str:
    return f"TP={tp}" if pp == 1 else f"TP={tp} PP={pp}"


def _write(tp: int, pp: int, params: SamplingParams, show: bool) -> tuple[list[list[int]], list[RankMemory]]:
    """Stream every prompt if asked, then generate all at once; print what that took; return the tokens and the memory."""
    with at_once():
        from lockstep.llm import LLM

    start = time.perf_counter()
    with LLM(tensor_parallel_size=tp, pipeline_parallel_size=pp, dtype="float32", max_model_len=1024) as llm:
        ready_s = time.perf_counter() - start
        for prompt in PROMPTS if show else ():
            _stream(llm, prompt, params)
        begin = time.perf_counter()
        outputs = llm.generate(PROMPTS, params, use_tqdm=False)
        took_s = time.perf_counter() - begin
        tokens = [list(o.outputs[0].token_ids) for o in outputs]
        speed = sum(map(len, tokens)) / took_s
        print(f"{_split(tp, pp)}: ready in {ready_s:.1f} s, {speed:.0f} tokens/s over {len(PROMPTS)} prompts together")
        return tokens, llm.memory()


def _stream(llm: object, prompt: str, params: SamplingParams) -> None:
    """Print one completion token by token."""
    print(f"\n{prompt}", end="", flush=True)
    shown = 0
    for output in llm.stream(prompt, params):  # type: ignore[attr-defined]
        text = output.outputs[0].text
        sys.stdout.write(text[shown:])
        sys.stdout.flush()
        shown = len(text)
    print(f"\n{'-' * 40}")
