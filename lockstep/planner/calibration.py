"""What `lockstep calibrate` found on a machine: a catalogue entry as JSON, read as a device and as the engine's step times.

One file is one machine. Its first part are the six numbers that every device has; `modes` are the engine's own operations,
measured with so many ranks at work at once, each with its share of the cores.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path

import msgspec

from lockstep.config.errors import ConfigError
from lockstep.planner.entry import to_entry
from lockstep.planner.hardware import DecodeFit, Device, ErrorBand, Link, PrefillFit, Roofline
from lockstep.utils import env

FORMAT = 8
USUAL_HEAD = 128  # width, of models on devices that are priced in general
DISTURBED = 1.1  # times as long: from here on it is said
MEASURED = ErrorBand(operation=0.10, tpot=0.20, ttft=0.20)  # on the machine that was measured, see docs/planner_cpu.md


class Line(msgspec.Struct, frozen=True):
    """base_s + per_s * x."""

    base_s: float = 0.0
    per_s: float = 0.0

    def at(self, x: float) -> float:
        return self.base_s + self.per_s * x


class ProductRates(msgspec.Struct, frozen=True):
    """Packed products of so many rows: launch_s + edge_s * (n + k) + work * n * k, and what follows a product in place.

    work: (bytes of all weights that a step reads, seconds per weight), ascending: small models stay in the caches.
    """

    rows: int
    launch_s: float
    edge_s: float
    work: list[tuple[float, float]]
    gate_s: float  # per output of a gated product: activation
    finish_s: float  # per output of a row-parallel one: residual and norm


class AttentionRates(msgspec.Struct, frozen=True):
    """base_s + byte_s * bytes of keys and values + pair_s * (query, key) pairs x head width x query heads + row_s * such rows
    + score_s * pairs x query heads (a score is one exponential, however wide the head),
    and far_s for each of those bytes that comes from memory: all that a step reads, over itself and the last cache."""

    base_s: float
    byte_s: float
    pair_s: float
    row_s: float
    far_s: float = 0.0
    score_s: float = 0.0


class Mode(msgspec.Struct, frozen=True, eq=False):  # compared and hashed by identity, so usable as a cache key
    """Costs on one of `ranks` ranks that share the machine, while `busy` of them work, and other programs leave it alone.

    Lines are over elements, unless they say so.
    """

    ranks: int
    busy: int
    threads: int  # of each rank
    bandwidth: float  # bytes/s at which each of them reads weights that no cache holds
    flops: float  # and multiplies many rows by them, 1/s
    products: list[ProductRates]  # by rows, ascending
    decode: AttentionRates
    prefill: AttentionRates
    rope: Line  # tokens of prompts x width of queries, keys and values
    angles: Line  # tokens x head width
    embed: Line  # tokens x hidden
    norm: Line  # tokens x hidden
    choose: Line  # rows x vocabulary: from logits to a token
    rope_one: Line | None = None  # the same for requests of one token each, whose places in the cache are far apart; None: as of prompts
    choose_far_s: float = 0.0  # and what more where a step leaves no caches
    combine: Line = Line()  # tokens x hidden: what summing over the ranks adds to a row-parallel product
    exchange: Line = Line()  # rows x vocabulary: what the exchange of the best tokens adds
    step: Line = Line()  # rows: what the engine, the executor and the worker add to each step
    step_far: Line = Line()  # the same where a step is read from memory and leaves them no caches
    far_bytes: float = 0.0  # weights of such a step; of fewer, beyond the last cache, that is so in part; 0: at once
    prompt_s: float = 0.0  # what they add for each prompt that begins
    prompt_token_s: float = 0.0  # and for each of its tokens
    hop: Line = Line()  # bytes: from one pipeline stage to the next
    small_steps: list[tuple[int, int, float]] = []  # rows, tokens of their prompts, seconds of a step: the engine that `step` is from
    disturbed: float = 1.0  # how much longer steps took in the usual round than in the quicker ones: other programs, or virtual machines
    samples: dict[str, list[list[float]]] = {}  # by kind, as in `cpu_tables.py`: where they predict each other better than the constants
    tried: dict[str, tuple[float, float]] = {}  # by kind: mean errors on held-out samples, of the constants and of the other samples


class Calibration(msgspec.Struct, frozen=True, kw_only=True):
    """One machine's entry. bandwidth in bytes/s of all cores together, flops in 1/s likewise."""

    name: str
    machine: str
    cores: int
    kernels: str
    dtype: str
    capacity_bytes: int
    memory_bandwidth: float
    cache_bytes: int  # the last-level cache: weights beyond it are read from memory
    flops: dict[str, float]
    all_reduce: list[tuple[int, float]]  # (bytes, seconds) between 2 ranks
    send_recv: list[tuple[int, float]]
    modes: list[Mode]
    seconds: float = 0.0  # that calibration took
    format: int = FORMAT

    def mode(self, ranks: int, busy: int | None = None) -> Mode:
        """The measured mode nearest to `ranks` ranks on this machine, `busy` of them (default: all) at work at once."""
        return min(self.modes, key=lambda m: (abs(m.ranks - ranks), abs(m.busy - (busy or m.ranks))))

    def device(self) -> Device:
        """The machine, one rank on all of its cores, as one device of a cluster: what the general cost model needs."""
        mode = self.mode(1)
        dense = max(mode.products, key=lambda p: p.rows)
        flops = self.flops[self.dtype]
        link = link_of(self.all_reduce)
        return Device(
            name=self.name,
            flops=self.flops,
            memory_bandwidth=self.memory_bandwidth,
            capacity_bytes=self.capacity_bytes,
            scale_up=link,
            scale_out=link,
            per_node=1,
            cores=self.cores,
            gemm={self.dtype: Roofline(dense.launch_s, _share(2 * dense.rows / flops, dense.work[-1][1]), 1.0)},
            prefill=PrefillFit(mode.prefill.base_s, _share(4 / flops, mode.prefill.pair_s + mode.prefill.score_s / USUAL_HEAD), 1.0),
            decode=DecodeFit(mode.decode.base_s, _share(1 / self.memory_bandwidth, mode.decode.byte_s)),
            elementwise=Roofline(mode.norm.base_s, 1.0, 1.0),
            calibrated=True,
            band=MEASURED,
            platform="cpu",
            source=f"lockstep calibrate on {self.machine}",
        )


def _share(least_s: float, seconds: float) -> float:
    """Which share of the peak something reaches that at best takes `least_s`: at most all of it."""
    return min(1.0, least_s / seconds) if seconds > 0 else 1.0


def link_of(table: list[tuple[int, float]]) -> Link:
    """The line through a table of (bytes, seconds): its smallest size is the launch, its largest gives the bandwidth."""
    if not table:
        return Link(0.0, 0.0, 1e9)
    (_, launch_s), (most, slowest_s) = table[0], table[-1]
    return Link(launch_s, 0.0, most / max(slowest_s - launch_s, 1e-9))


def path_of(name: str = "this") -> Path:
    """The file of an entry by its name, where `catalogue.device` looks for it."""
    return env.cache_folder() / "devices" / f"{name}.json"


def save(found: Calibration, path: Path) -> None:
    """Write the catalogue entry, with all that was measured under `engine`; whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    part.write_bytes(msgspec.json.format(msgspec.json.encode({**to_entry(found.device()), "engine": found}), indent=1))
    part.replace(path)


def of_device(device: Device) -> Calibration | None:
    """What was measured of the engine on this device; None where nothing was. Raises ConfigError for what another version wrote."""
    if device.engine is None:
        return None
    try:
        found = msgspec.convert(device.engine, Calibration)
    except msgspec.ValidationError as e:
        raise ConfigError(f"device {device.name}: its calibration cannot be read ({e}): run `lockstep calibrate` again.") from None
    return _current(found, f"device {device.name}")


class _Entry(msgspec.Struct):
    engine: Calibration


def load(path: Path | None = None) -> Calibration:
    """What was measured of an entry; by default this machine's. Raises ConfigError when there is none, or it is of another version."""
    path = path or path_of()
    try:
        found = msgspec.json.decode(path.read_bytes(), type=_Entry).engine
    except FileNotFoundError:
        raise ConfigError(f"{path} is not there: run `lockstep calibrate` on this machine first (it takes less than a minute).") from None
    except (OSError, msgspec.DecodeError) as e:
        raise ConfigError(f"{path} is no calibration ({e}): run `lockstep calibrate` again.") from None
    return _current(found, str(path))


def _numbers(found: object, name: str = "engine") -> Iterator[tuple[str, float]]:
    """(where it is, number) of all that a calibration holds."""
    if isinstance(found, Mapping):
        for key, value in found.items():
            yield from _numbers(value, f"{name}.{key}")
    elif isinstance(found, list | tuple):
        for value in found:
            yield from _numbers(value, name)
    elif isinstance(found, int | float):
        yield name, float(found)


def _current(found: Calibration, where: str) -> Calibration:
    if found.format != FORMAT:
        raise ConfigError(f"{where} has format {found.format}, and this version reads {FORMAT}: run `lockstep calibrate` again.")
    for name, value in _numbers(msgspec.to_builtins(found)):
        if not 0 <= value < math.inf:
            raise ConfigError(f"{where} has {name}={value:g}, which was not measured: run `lockstep calibrate` again.")
    return found
