"""`lockstep collect-env`: what to put into a bug report. Versions, the processor and its kernels, devices, variables that matter.

Imports no torch: it works where torch does not.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
from importlib.metadata import PackageNotFoundError, version
from itertools import chain
from typing import Any

import psutil

from lockstep.cli.doctor_cpu import ranges
from lockstep.cli.parser import Parser
from lockstep.kernels import build
from lockstep.kernels.library import choose
from lockstep.kernels.variants import cpu_flags, usable
from lockstep.utils import env
from lockstep.utils.cores import quota, usable_cores
from lockstep.version import __version__

PACKAGES = (
    *("torch", "numpy", "transformers", "tokenizers", "safetensors", "huggingface_hub", "msgspec", "pyzmq", "fastapi", "starlette"),
    *("pydantic", "uvicorn", "uvloop", "httptools", "prometheus_client", "llguidance", "rich", "tyro", "psutil", "ray"),
    *("opentelemetry-sdk", "openai", "triton", "nvidia-nccl-cu12"),
)


def run(argv: list[str]) -> int:
    """Print it, as text or JSON."""
    parser = Parser(prog="lockstep collect-env", description=__doc__.partition("\n")[0])
    parser.add_argument("--json", action="store_true", help="as one JSON object")
    args = parser.parse_args(argv)
    found = collect()
    if args.json:
        print(json.dumps(found))
        return 0
    for part, rows in found.items():
        print(f"[{part}]")
        width = max(map(len, rows), default=0)
        for name, value in rows.items():
            first, *more = str(value).splitlines() or [""]
            print(f"{name:<{width}}  {first}", *more, sep=f"\n{'':<{width}}  ")
        print()
    return 0


def collect() -> dict[str, dict[str, Any]]:
    """Part -> what it is -> what was found."""
    return {
        "lockstep": {"lockstep": __version__, "python": platform.python_version(), "platform": platform.platform(), **_packages()},
        "processor": _processor(),
        "memory": _memory(),
        "devices": _devices(),
        "variables": env.that_matter(),
    }


def _packages() -> dict[str, str]:
    found = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


def _processor() -> dict[str, Any]:
    cores, limit = usable_cores(), quota()
    cpus = sorted(chain(*cores))
    try:
        chosen = choose()
        kernels = "torch (LOCKSTEP_KERNELS)" if chosen is None else chosen.name
        path = None if chosen is None else build.built(chosen)
        library = "" if chosen is None else str(path or "not built yet")
    except (ValueError, build.BuildError) as e:
        kernels, library = f"none: {e}", ""
    return {
        "model": _cpu_model(),
        "cores": f"{len(cores)} with {len(cpus)} CPUs ({ranges(cpus)})" + (f", {limit:g} CPUs' worth of time" if limit else ""),
        "vectors": ", ".join(sorted(cpu_flags() & {"avx2", "avx512f", "avx512_bf16", "amx_bf16", "amx_int8"})) or "none that matter",
        "kernels": kernels,
        "kernels usable": ", ".join(variant.name for variant in usable()),
        "library": library,
        "load": ", ".join(f"{x:.1f}" for x in os.getloadavg()),
    }


def _cpu_model() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            return next((line.partition(":")[2].strip() for line in file if line.startswith("model name")), platform.processor())
    except OSError:
        return platform.processor()


def _memory() -> dict[str, str]:
    memory = psutil.virtual_memory()
    found = {"memory": f"{memory.available / 2**30:.1f} of {memory.total / 2**30:.1f} GiB free"}
    if os.path.isdir("/dev/shm"):
        shm = shutil.disk_usage("/dev/shm")
        found["/dev/shm"] = f"{shm.free / 2**20:.0f} of {shm.total / 2**20:.0f} MiB free"
    return found


def _devices() -> dict[str, str]:
    smi = shutil.which("nvidia-smi")
    if smi is None:
        return {"gpu": "none: no nvidia-smi"}
    return {
        "gpu": _said(smi, "--query-gpu=index,name,driver_version,memory.total", "--format=csv,noheader"),
        "topology": _said(smi, "topo", "-m"),
    }


def _said(*command: str) -> str:
    try:
        done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired) as e:
        return f"{command[0]} failed: {e}"
    return done.stdout.strip() or done.stderr.strip()
