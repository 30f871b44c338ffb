"""transformers' own generate() as a peer: a process of its own that answers workloads, so that runs can alternate.

`python -m lockstep.cli.bench.peer FOLDER DTYPE THREADS BATCH` reads one JSON workload per line on standard input and
answers each with a line `{"seconds": s, "tokens": [[...]]}`. Prompts go in arrival order in left-padded batches of
BATCH; each batch runs to its longest output, which is what plain generate() users get.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from lockstep.cli.bench.workload import Workload


class TransformersPeer:
    """Talks to the peer process. `run` returns (seconds, tokens of each prompt)."""

    def __init__(self, folder: Path, dtype: str, threads: int, batch: int) -> None:
        args = [sys.executable, "-m", "lockstep.cli.bench.peer", str(folder), dtype, str(threads), str(batch)]
        self.process = subprocess.Popen(args, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        self.version = json.loads(self._line())["version"]

    def run(self, work: Workload) -> tuple[float, list[list[int]]]:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps({"prompts": work.prompts, "outs": work.output_lens}) + "\n")
        self.process.stdin.flush()
        reply = json.loads(self._line())
        return reply["seconds"], reply["tokens"]

    def _line(self) -> str:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"the transformers peer ended (exit code {self.process.wait()}): run it by hand to see why")
        return line

    def close(self) -> None:
        self.process.kill()
        self.process.wait()


def _generate(model: Any, prompts: list[list[int]], outs: list[int], pad: int) -> list[list[int]]:
    import torch

    most, width = max(outs), max(map(len, prompts))
    ids = torch.tensor([[pad] * (width - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
    with torch.inference_mode():
        done = model.generate(
            ids, attention_mask=mask, max_new_tokens=most, min_new_tokens=most, do_sample=False, pad_token_id=pad, eos_token_id=None
        )
    return [row[:n] for row, n in zip(done[:, width:].tolist(), outs, strict=True)]


def main(folder: str, dtype: str, threads: str, batch: str) -> None:
    """Load the model, say hello, answer until standard input ends."""
    import torch
    import transformers

    torch.set_num_threads(int(threads))
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype), attn_implementation="sdpa").eval()
    model.generation_config.eos_token_id = None
    _generate(model, [[5, 6, 7]], [2], 0)
    print(json.dumps({"version": transformers.__version__}), flush=True)
    size = int(batch)
    for line in sys.stdin:
        work = json.loads(line)
        start, tokens = time.perf_counter(), []
        for i in range(0, len(work["prompts"]), size):
            tokens += _generate(model, work["prompts"][i : i + size], work["outs"][i : i + size], 0)
        print(json.dumps({"seconds": time.perf_counter() - start, "tokens": tokens}), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
