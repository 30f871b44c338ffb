"""Two engines on one host at once, each a program of its own with two ranks: neither disturbs the other."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from lockstep.testing.tiny import make_tiny

SCRIPT = """
import sys
from lockstep import LLM, SamplingParams
prompts = [[5, 6, 7 + i] for i in range(6)]
with LLM(sys.argv[1], tensor_parallel_size=2, threads_per_rank=1) as llm:
    print("ready", flush=True)
    sys.stdin.readline()  # both engines are up: now they run at the same time
    for _ in range(3):
        outputs = llm.generate(prompts, SamplingParams(temperature=0, max_tokens=24, ignore_eos=True), use_tqdm=False)
    print([list(o.outputs[0].token_ids) for o in outputs], flush=True)
"""


def test_two_engines_run_at_once_and_write_what_one_writes(tmp_path: Path) -> None:
    model = make_tiny("llama", tmp_path)
    engines = [
        subprocess.Popen([sys.executable, "-c", SCRIPT, str(model)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    try:
        for engine in engines:  # started together: they look for ports and shared memory at the same time
            assert engine.stdout is not None and engine.stdout.readline() == "ready\n"
        for engine in engines:
            assert engine.stdin is not None
            engine.stdin.write("\n")
            engine.stdin.flush()
        outputs = [engine.communicate(timeout=120)[0] for engine in engines]
    finally:
        for engine in engines:
            engine.kill()
            engine.wait()
    assert [engine.returncode for engine in engines] == [0, 0]
    alone = subprocess.run([sys.executable, "-c", SCRIPT, str(model)], input="\n", capture_output=True, text=True, timeout=120, check=True)
    assert outputs[0] == outputs[1] == alone.stdout.removeprefix("ready\n") and outputs[0].startswith("[[")
