#!/usr/bin/env python3
"""What equal bits cost: the same engine with the fixed atoms of docs/numerics.md and with one sum per rank, in turn.

`python benchmarks/guarantee.py MODEL [--tensor-parallel-size 1] [--repetitions 3]` runs two engines side by side, one of them
under LOCKSTEP_LOOSE_ATOMS=1 (each rank's columns summed in one go: the bits then depend on the split), measures them in
turn, and prints one JSON line per figure: decode tokens/s at batch 1, 8, 32 and prefill tokens/s, with / without / ratio.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from statistics import median
from typing import Any

from lockstep.cli.bench import machine

WORK = (("decode", 1, 128, 64), ("decode", 8, 128, 64), ("decode", 32, 128, 64), ("prefill", 8, 512, 1))  # kind, batch, prompt, output


def serve(model: str, tp: int) -> None:
    """One engine: a line `batch prompt output seed` in, the seconds of that batch out."""
    import time

    from lockstep import LLM, SamplingParams

    with LLM(model, tensor_parallel_size=tp, enable_prefix_caching=False, max_model_len=1024, kv_cache_memory_bytes=1 << 29) as llm:
        print("ready", flush=True)
        for line in sys.stdin:
            batch, length, out, seed = map(int, line.split())
            prompts: list[Any] = [
                {"prompt_token_ids": [100 + (seed * 7919 + i * 131 + j * 17) % 5000 for j in range(length)]} for i in range(batch)
            ]
            params = SamplingParams(temperature=0, max_tokens=out, ignore_eos=True, detokenize=False)
            start = time.perf_counter()
            llm.generate(prompts, params, use_tqdm=False)
            print(time.perf_counter() - start, flush=True)


class Engine:
    """The child that runs one of the two."""

    def __init__(self, model: str, tp: int, loose: bool) -> None:
        environment = {**os.environ, "LOCKSTEP_LOOSE_ATOMS": "1" if loose else ""}
        command = [sys.executable, __file__, model, "--tensor-parallel-size", str(tp), "--serve"]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)
        self._read()

    def _read(self) -> str:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit("an engine ended: see its error above")
        return line

    def seconds(self, batch: int, length: int, out: int, seed: int) -> float:
        assert self.process.stdin is not None
        self.process.stdin.write(f"{batch} {length} {out} {seed}\n")
        self.process.stdin.flush()
        return float(self._read())

    def rate(self, kind: str, batch: int, length: int, out: int, seed: int) -> float:
        """Tokens per second: of decode alone, or of prefill."""
        first = self.seconds(batch, length, 1, seed)
        return batch * length / first if kind == "prefill" else batch * (out - 1) / (self.seconds(batch, length, out, seed) - first)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--tensor-parallel-size", type=int, default=1)
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        return serve(args.model, args.tensor_parallel_size)
    engines = {"with": Engine(args.model, args.tensor_parallel_size, False), "without": Engine(args.model, args.tensor_parallel_size, True)}
    for kind, batch, length, out in WORK:
        rates: dict[str, list[float]] = {name: [] for name in engines}
        for engine in engines.values():
            engine.seconds(batch, length, min(out, 3), 0)
        for repetition in range(args.repetitions):
            for name, engine in engines.items():
                rates[name].append(engine.rate(kind, batch, length, out, repetition + 1))
        middle = {name: median(values) for name, values in rates.items()}
        base = {"model": os.path.basename(args.model), "tp": args.tensor_parallel_size, "command": "python " + " ".join(sys.argv)}
        base |= {"commit": machine.commit(), "machine": machine.describe(), "metric": f"{kind}_tok_s_b{batch}"}
        for name, values in rates.items():
            line = {"engine": f"{name} fixed atoms", **base, "value": round(middle[name], 1), "unit": "tok/s"}
            print(json.dumps({**line, "all": [round(value, 1) for value in values]}))
        ratio = round(middle["with"] / middle["without"], 3)
        print(json.dumps({"engine": "with / without", **base, "value": ratio, "unit": "x"}), flush=True)
    for engine in engines.values():
        assert engine.process.stdin is not None
        engine.process.stdin.close()
        engine.process.wait(30)
    return None


if __name__ == "__main__":
    main()
