#!/usr/bin/env python3
"""What int8 weights cost in accuracy, on the demo model and text that it was not trained on.

`python benchmarks/int8_accuracy.py [--documents 40]` prints one JSON line per type: the mean negative log-likelihood of a
token in nats, and how often its most likely token is that of float32.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from lockstep import LLM, SamplingParams
from lockstep.cli.bench import machine

sys.path.insert(0, str(Path(__file__).parent.parent / "scripts"))
VARIANTS: tuple[dict[str, Any], ...] = ({"dtype": "float32"}, {"dtype": "bfloat16"}, {"dtype": "bfloat16", "quantization": "int8"})
TOKENS = 512  # of each document


def held_out_texts(count: int) -> list[str]:
    """Files that the demo model's training left out."""
    from train_demo_model import is_held_out, stdlib_files  # type: ignore[import-not-found]

    return [text for path, text in sorted(stdlib_files()) if is_held_out(path) and len(text) > 2000][:count]


def measure(prompts: list[list[int]], settings: dict[str, Any]) -> tuple[float, list[int]]:
    """Mean negative log-likelihood of the prompts' tokens, and the most likely token at each place."""
    total, places, best = 0.0, 0, []
    params = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=1)
    with LLM(**settings, max_model_len=TOKENS + 1) as llm:
        for output in llm.generate([{"prompt_token_ids": p} for p in prompts], params, use_tqdm=False):
            for token, position in zip(output.prompt_token_ids[1:], (output.prompt_logprobs or [])[1:], strict=True):
                assert position is not None
                total -= position[token].logprob
                places += 1
                best.append(max(position, key=lambda t: position[t].logprob))
    return total / places, best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--documents", type=int, default=40)
    args = parser.parse_args()
    with LLM(max_model_len=64) as llm:
        tokenizer = llm.get_tokenizer()
    prompts = [tokenizer.encode(text)[:TOKENS] for text in held_out_texts(args.documents)]
    reference: list[int] = []
    for settings in VARIANTS:
        loss, best = measure(prompts, settings)
        reference = reference or best
        agreement = sum(a == b for a, b in zip(best, reference, strict=True)) / len(best)
        what = "int8" if "quantization" in settings else settings["dtype"]
        base = {"engine": "lockstep", "model": "demo", "dtype": what, "tokens": len(best), "command": "python " + " ".join(sys.argv)}
        base |= {"commit": machine.commit(), "machine": machine.describe()}
        for metric, value, unit in (("nll_per_token", loss, "nats"), ("top1_as_float32", agreement, "share")):
            print(json.dumps({**base, "metric": metric, "value": round(value, 5), "unit": unit}), flush=True)


if __name__ == "__main__":
    main()
