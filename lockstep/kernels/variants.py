"""Which CPU a kernel library is for. A variant is one whole library, so within it every operation has one set of bits."""

from __future__ import annotations

import platform
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from lockstep.kernels import amx


@dataclass(frozen=True)
class Variant:
    """name: as in `LOCKSTEP_KERNELS`. needs: what /proc/cpuinfo must list. machine: what `uname -m` must say, "" for any."""

    name: str
    flags: tuple[str, ...] = ()
    needs: frozenset[str] = frozenset()
    machine: str = ""


_V4 = ("-march=x86-64-v4", "-mprefer-vector-width=512")
_AVX512 = frozenset({"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"})

# Best first.
VARIANTS = (
    Variant(
        "amx",
        (*_V4, "-mavx512bf16", "-mavx512vnni", "-mamx-tile", "-mamx-bf16"),
        _AVX512 | {"avx512_bf16", "avx512_vnni", "amx_tile", "amx_bf16"},
        "x86_64",
    ),
    Variant("avx512bf16", (*_V4, "-mavx512bf16"), _AVX512 | {"avx512_bf16"}, "x86_64"),
    Variant("avx512", _V4, _AVX512, "x86_64"),
    Variant("avx2", ("-march=x86-64-v3",), frozenset({"avx2", "fma", "f16c", "bmi2"}), "x86_64"),
    Variant("generic"),
)
# For tests: the tile unit in plain code, so that the AMX path's indexing runs on any machine with AVX-512.
EMULATED = Variant("amx-emulated", (*VARIANTS[1].flags, "-DLOCKSTEP_EMULATE_AMX"), VARIANTS[1].needs, "x86_64")


def cpu_flags(cpuinfo: str | None = None) -> frozenset[str]:
    """The features that the kernel lists for the first core; empty where it does not."""
    if cpuinfo is not None:
        return _flags(cpuinfo.splitlines())
    try:
        with Path("/proc/cpuinfo").open() as lines:  # not read to its end: on many cores that takes long
            return _flags(lines)
    except OSError:
        return frozenset()


def _flags(lines: Iterable[str]) -> frozenset[str]:
    for line in lines:
        if line.split(":")[0].strip() in ("flags", "Features"):
            return frozenset(line.partition(":")[2].split())
    return frozenset()


def usable(flags: frozenset[str] | None = None, machine: str | None = None) -> list[Variant]:
    """The variants that this CPU, or one with `flags`, can run, best first. Never empty.

    For this CPU the permission to use AMX tiles is asked for, and a process that is refused it has no such CPU.
    """
    ours = flags is None
    flags = cpu_flags() if flags is None else flags
    if ours and "amx_tile" in flags and amx.refusal():
        flags = frozenset(flag for flag in flags if not flag.startswith("amx"))
    machine = machine or platform.machine()
    return [v for v in VARIANTS if v.needs <= flags and v.machine in ("", machine)]
