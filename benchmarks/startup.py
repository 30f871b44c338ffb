#!/usr/bin/env python3
"""How long a user waits: `import lockstep`, and from starting Python to the first token of the demo model.

`python benchmarks/startup.py [--tensor-parallel-size 2] [--repetitions 5]` starts a fresh process for each repetition
and prints one JSON line per figure, with a bare `import torch` measured in turn beside them: what no engine can beat.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from statistics import median

from lockstep.cli.bench import machine

BARE_TORCH = "import torch"
IMPORT = "import time; start = time.perf_counter(); import lockstep; took = time.perf_counter() - start; import sys; \
assert 'torch' not in sys.modules; print(took)"
FIRST_TOKEN = """
from lockstep import LLM, SamplingParams
with LLM(tensor_parallel_size={tp}) as llm:
    next(iter(llm.stream("def f(", SamplingParams(temperature=0, max_tokens=1))))
    print("first token", flush=True)
"""


def seconds_to_first_line(code: str) -> float:
    """Seconds from starting a Python to its first line of output, or to its end where it prints none."""
    start = time.perf_counter()
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.readline()
        took_s = time.perf_counter() - start
        errors = process.stderr.read()
    if process.returncode:
        raise SystemExit(f"the measured program failed:\n{errors}")
    return took_s


def import_seconds() -> float:
    """Seconds of `import lockstep` alone, in a fresh process; fails if it loaded torch."""
    return float(subprocess.run([sys.executable, "-c", IMPORT], capture_output=True, text=True, check=True).stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tensor-parallel-size", type=int, default=2)
    parser.add_argument("--repetitions", type=int, default=5)
    args = parser.parse_args()
    figures: dict[str, list[float]] = {"import_lockstep": [], "import_torch": [], "start_to_first_token": []}
    code = FIRST_TOKEN.format(tp=args.tensor_parallel_size)
    seconds_to_first_line(code)  # fills the page cache, which is the same for all
    for _ in range(args.repetitions):
        figures["import_lockstep"].append(import_seconds())
        figures["import_torch"].append(seconds_to_first_line(BARE_TORCH))
        figures["start_to_first_token"].append(seconds_to_first_line(code))
    for metric, values in figures.items():
        line = {"engine": "torch" if metric == "import_torch" else "lockstep", "model": "demo", "dtype": "float32", "metric": metric}
        line |= {"tp": args.tensor_parallel_size, "value": round(median(values), 3), "unit": "s", "all": [round(v, 3) for v in values]}
        line |= {
            "command": f"python benchmarks/startup.py --tensor-parallel-size {args.tensor_parallel_size}",
            "machine": machine.describe(),
        }
        print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
