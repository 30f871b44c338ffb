"""The limits of a CPU at this moment: how fast memory can be read (decode), and how fast it multiplies bfloat16 (prefill)."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

from lockstep.cli.bench import machine

HERE = Path(__file__).parent
_MIB, _REPEATS = 1024, 5


def compile_c(source: Path, folder: Path) -> Path | None:
    """`source` as a program for this very machine, in `folder`; None when there is no C compiler."""
    compiler = next((c for c in (os.environ.get("CC"), "cc", "gcc", "clang") if c and shutil.which(c)), None)
    if compiler is None:
        return None
    program = folder / source.stem
    subprocess.run([compiler, "-O3", "-march=native", "-pthread", "-DLIMITS_MAIN", "-o", str(program), str(source)], check=True, timeout=60)
    return program


class Bandwidth:
    """Measures on the given cores, with a small C program, or with numpy where no compiler is (pages as they come)."""

    def __init__(self, cores: Sequence[int]) -> None:
        self.cores = list(cores)
        self._folder = tempfile.TemporaryDirectory(prefix="bandwidth-")
        self._program = compile_c(HERE / "memread.c", Path(self._folder.name))
        self._peak = compile_c(HERE.parent / "gemm_limits.cpp", Path(self._folder.name))

    def gbps(self, threads: int, huge: bool, mib: int = _MIB, repeats: int = _REPEATS) -> float:
        """Median read bandwidth in GB/s of `threads` threads over `mib` MiB in all, on huge or 4 KiB pages."""
        if self._program is None:
            return machine.read_bandwidth_gbps(threads, mib // threads, repeats)
        return float(self._ask(threads, huge, mib, repeats)["median_GBps"])

    def gflops(self) -> float:
        """GFLOP/s in bfloat16 of all cores together, on registers; 0 where that cannot be told."""
        if self._peak is None:
            return 0.0
        done = subprocess.run([str(self._peak), *map(str, self.cores)], check=True, capture_output=True, text=True, timeout=120)
        return float(done.stdout)

    def all(self) -> dict[str, float]:
        """GB/s by "<threads>t_4k" and "<threads>t_huge", for one thread and for one on every core; and how many of the
        MiB asked for in huge pages the system granted."""
        counts = sorted({1, len(self.cores)})
        if self._program is None:
            return {f"{n}t_numpy": self.gbps(n, huge=False) for n in counts}
        figures = {f"{n}t_{'huge' if huge else '4k'}": self.gbps(n, huge) for n in counts for huge in (False, True)}
        return figures | {"huge_mib_granted": self._ask(1, True, _MIB, 1)["huge_mib"], "huge_mib_asked": float(_MIB)}

    def _ask(self, threads: int, huge: bool, mib: int, repeats: int) -> dict[str, float]:
        assert self._program is not None
        arguments = [str(a) for a in (threads, mib, repeats, int(huge), *self.cores)]
        done = subprocess.run([str(self._program), *arguments], check=True, capture_output=True, text=True, timeout=120)
        return dict(json.loads(done.stdout))


def streamed_bytes(model: Path, bytes_per_weight: int) -> int:
    """Bytes that one decode step must read: every weight once, without an embedding table of which it reads a few rows."""
    shapes: dict[str, list[int]] = {}
    for file in sorted(model.glob("*.safetensors")):
        with file.open("rb") as data:
            header = json.loads(data.read(int.from_bytes(data.read(8), "little")))
        shapes |= {name: tensor["shape"] for name, tensor in header.items() if name != "__metadata__"}
    tied = json.loads((model / "config.json").read_text()).get("tie_word_embeddings", False)
    skipped = () if tied else ("embed_tokens.weight",)
    return sum(_product(shape) for name, shape in shapes.items() if not name.endswith(skipped)) * bytes_per_weight


def prefill_flops(model: Path, length: int) -> float:
    """Multiplications and additions for each token of a prompt of `length`: all layers' products, and attention's two."""
    config = json.loads((model / "config.json").read_text())
    heads = config["num_attention_heads"]
    width = heads * config.get("head_dim", config["hidden_size"] // heads)
    attention = config["num_hidden_layers"] * 2 * width * (length + 1) / 2
    vocabulary = config["vocab_size"] * config["hidden_size"]  # the head computes one token of each prompt
    return 2 * (streamed_bytes(model, 1) - vocabulary + attention)


def last_cache_bytes() -> int:
    """Size of the last-level cache of core 0, 0 when the system does not say."""
    largest = 0
    for size in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = size.read_text().strip()
        largest = max(largest, int(text.rstrip("KMG")) * {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}.get(text[-1], 1))
    return largest


def _product(shape: Sequence[int]) -> int:
    total = 1
    for n in shape:
        total *= n
    return total
