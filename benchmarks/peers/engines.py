"""Which engines there are, how each is started, and how a user names one: `NAME[@TP][+key=value...]`.

`lockstep@2`, `lockstep@1+quantization=int8`, `vllm+enforce_eager=true`, `openvino+kv=u8`. A lower-case key is a setting
of the engine, an upper-case one a variable of its environment: `lockstep+LOCKSTEP_KERNELS=torch`, or
`lockstep+PYTHONPATH=/some/older/checkout` to compare with our former self.
"""

from __future__ import annotations

import glob
import json
import os
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
NAMES = ("lockstep", "vllm", "openvino", "transformers")
ONE_PROCESS = ("openvino", "transformers")  # they know no tensor parallelism: one process, all cores


@dataclass(frozen=True)
class Run:
    """What is the same for every engine of a run."""

    model: str
    openvino_model: str
    dtype: str
    cores: tuple[int, ...]
    kv_gib: int
    max_num_seqs: int
    max_num_batched_tokens: int
    max_model_len: int
    prefix_caching: bool
    pythons: dict[str, str]  # by engine name
    tcmalloc: str


@dataclass(frozen=True)
class Engine:
    """One engine under test. `label` is what the user wrote."""

    label: str
    name: str
    tp: int
    more: dict[str, Any] = field(default_factory=dict)
    variables: dict[str, str] = field(default_factory=dict)

    @property
    def ranks(self) -> int:
        """Processes that compute."""
        return self.tp * int(self.more.get("pipeline_parallel_size", 1)) * int(self.more.get("data_parallel_size", 1))

    def threads(self, run: Run) -> int:
        """Compute threads of each of its ranks."""
        return int(self.more.get("threads_per_rank", max(1, len(run.cores) // self.ranks)))


def parse(text: str, tp: int) -> Engine:
    """An engine from its label; `tp` where it says none. Raises ValueError, saying what a label looks like."""
    head, *pairs = text.split("+")
    name, _, size = head.partition("@")
    if name not in NAMES:
        raise ValueError(f"engine {text!r}: {name!r} is not one of {', '.join(NAMES)}. A label is NAME[@TP][+key=value...].")
    if size and not (size.isdigit() and int(size) > 0):
        raise ValueError(f"engine {text!r}: {size!r} is not a tensor-parallel size; write for example {name}@2.")
    if name in ONE_PROCESS and size not in ("", "1"):
        raise ValueError(f"engine {text!r}: {name} has no tensor parallelism; leave @{size} out.")
    more: dict[str, Any] = {}
    variables: dict[str, str] = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals or not key:
            raise ValueError(f"engine {text!r}: {pair!r} is not key=value.")
        if key.isupper():
            variables[key] = value
        else:
            more[key] = _value(value)
    return Engine(text, name, 1 if name in ONE_PROCESS else int(size or tp), more, variables)


def _value(text: str) -> Any:
    """Numbers, true, false and null as JSON has them; everything else is text."""
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text


def command(engine: Engine, run: Run) -> list[str]:
    """The program to start."""
    python = run.pythons.get(engine.name, sys.executable)
    if engine.name == "transformers":
        return [python, "-m", "lockstep.cli.bench.peer", run.model, run.dtype, str(len(run.cores)), str(engine.more.get("batch", 32))]
    ours = {"dtype"} if engine.name == "lockstep" else {"dtype", "threads_per_rank"}  # not arguments of the engine itself
    settings = {
        "model": run.model,
        "openvino_model": run.openvino_model,
        "dtype": engine.more.get("dtype", run.dtype),
        "tp": engine.tp,
        "threads": engine.threads(run),
        "kv_bytes": run.kv_gib << 30,
        "max_num_seqs": run.max_num_seqs,
        "max_num_batched_tokens": run.max_num_batched_tokens,
        "max_model_len": run.max_model_len,
        "prefix_caching": run.prefix_caching,
        "more": {key: value for key, value in engine.more.items() if key not in ours},
    }
    return [python, str(HERE / f"engine_{engine.name}.py"), json.dumps(settings)]


def environment(engine: Engine, run: Run) -> dict[str, str]:
    """The environment to start it in."""
    environ = {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    if engine.name in run.pythons:  # another Python: our import path is not for it
        environ.pop("PYTHONPATH", None)
    if engine.name == "vllm":
        environ |= vllm_environment(run.pythons["vllm"], run.tcmalloc, thread_binding(engine.ranks, engine.threads(run), run.cores))
    return environ | engine.variables


def thread_binding(ranks: int, threads: int, cores: tuple[int, ...]) -> str:
    """vLLM's notation of the cores of each rank: "0|1" for two ranks of one thread, "0,1" for one rank of two."""
    taken = [cores[i % len(cores)] for i in range(ranks * threads)]
    return "|".join(",".join(map(str, taken[r * threads : (r + 1) * threads])) for r in range(ranks))


def vllm_environment(python: str, tcmalloc: str, binding: str) -> dict[str, str]:
    """What vLLM's manual asks for on CPU: its scripts on the path, tcmalloc and Intel's OpenMP loaded first, threads bound."""
    root = Path(python).absolute().parents[1]  # not resolved: the environment's python is a link
    preload = [path for path in (tcmalloc or find_tcmalloc(), str(root / "lib" / "libiomp5.so")) if path and Path(path).exists()]
    return {
        "PATH": f"{root / 'bin'}{os.pathsep}{os.environ.get('PATH', '')}",
        "LD_PRELOAD": ":".join(preload),
        "VLLM_CPU_OMP_THREADS_BIND": binding,
        "VLLM_LOGGING_LEVEL": "WARNING",
        "VLLM_NO_USAGE_STATS": "1",
    }


def find_tcmalloc() -> str:
    """The system's tcmalloc, empty when there is none (on Debian: apt-get install libtcmalloc-minimal4)."""
    found = glob.glob("/usr/lib/*/libtcmalloc_minimal.so.4") + glob.glob("/usr/lib*/libtcmalloc_minimal.so.4")
    return found[0] if found else ""
