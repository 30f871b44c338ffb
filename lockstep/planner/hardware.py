"""What a device and a cluster can do: the numbers behind every price, and nothing that measures or fits them.

A device is six data-sheet numbers (flops, memory bandwidth, capacity, and a bandwidth and a latency for each of the two
links) plus fitted constants. Constants that nobody measured on this device are those of the H100, which transfer between
GPUs with a known error; `Device.calibrated` and `Device.band` say which it is.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any

from lockstep.config.errors import ConfigError
from lockstep.planner.price import Price
from lockstep.planner.tables import Table

DTYPE_BYTES: Mapping[str, float] = MappingProxyType(
    {"float32": 4.0, "bfloat16": 2.0, "float16": 2.0, "fp8": 1.0, "int8": 1.0, "mxfp4": 17 / 32, "fp4": 0.5, "int4": 0.5}
)  # mxfp4: 4 bits, and 8 more for each block of 32
# Of a message's latency, what every further step of a ring pays again: an all-reduce of two ranks on two nodes (two steps)
# starts 1.7 times as late as one message does (vidur, A100).
STEP_SHARE = 0.7
# A device without units for a dtype computes in the next wider one that it has.
_WIDER = {
    "mxfp4": "bfloat16",
    "fp4": "fp8",
    "int4": "int8",
    "fp8": "bfloat16",
    "int8": "bfloat16",
    "float16": "bfloat16",
    "bfloat16": "float32",
}


@dataclass(frozen=True)
class Link:
    """The price of a message or a collective: launch_s + steps * step_s * S / (S + knee_bytes) + traffic / bandwidth.

    `bandwidth` is bytes/s in one direction per device. A knee of 0 is the plain alpha-beta line; a knee above it says that
    small messages take a protocol with fewer steps. What `steps` and `traffic` are, the collective says.
    """

    launch_s: float
    step_s: float
    bandwidth: float
    knee_bytes: float = 0.0

    def scaled(self, factor: float) -> Link:
        """The same link with so many times the bandwidth."""
        return replace(self, bandwidth=self.bandwidth * factor)

    def seconds(self, size_bytes: float, traffic_bytes: float, steps: int = 1) -> float:
        """size_bytes: the message as its owner sees it; traffic_bytes: what each device sends of it."""
        if size_bytes <= 0:
            return 0.0
        rise = size_bytes / (size_bytes + self.knee_bytes)
        return self.launch_s + steps * self.step_s * rise + traffic_bytes / self.bandwidth


@dataclass(frozen=True)
class Roofline:
    """launch_s + max(c, m) + exposed * min(c, m) with c = flop / (peak * flop_efficiency), m = bytes / (bandwidth * byte_efficiency).

    `exposed` is the share of the shorter of the two that does not hide behind the longer one.
    """

    launch_s: float
    flop_efficiency: float
    byte_efficiency: float
    exposed: float = 0.0

    def seconds(self, compute_s: float, memory_s: float) -> float:
        """compute_s and memory_s: what the data sheet's peaks would take."""
        c, m = compute_s / self.flop_efficiency, memory_s / self.byte_efficiency
        return self.launch_s + max(c, m) + self.exposed * min(c, m)


@dataclass(frozen=True)
class PrefillFit(Roofline):
    """A roofline whose compute rate grows with the blocks of work: blocks / (blocks + wave * cores) of it is reached.

    A block is one head of one sequence times `tile` query rows; with few of them the last wave leaves cores idle.
    """

    wave: float = 0.0
    tile: int = 128


@dataclass(frozen=True)
class DecodeFit:
    """launch_s + bytes / (bandwidth * byte_efficiency) + per_head_s for each (sequence, KV head)."""

    launch_s: float
    byte_efficiency: float
    per_head_s: float = 0.0


@dataclass(frozen=True)
class MoeFit(Roofline):
    """A roofline over the experts that are expected to be hit, plus a pass over all rows that a rank has, its own experts' or not.

    The pass (activation and the sum over experts) reaches `pass_efficiency` of the memory bandwidth. Routing that is not
    even loads the fullest of n expert ranks n ** skew times the mean.
    """

    pass_efficiency: float = 1.0
    skew: float = 0.0


@dataclass(frozen=True)
class ErrorBand:
    """Expected mean absolute error, as a fraction, of one operation, of TPOT and of TTFT."""

    operation: float
    tpot: float
    ttft: float


@dataclass(frozen=True)
class Tried:
    """Mean errors, as fractions, of a family's prices on measurements that they had not seen: by its formula, and by interpolating
    other measurements; None where no samples are kept, since that was no better."""

    formula: float
    table: float | None = None


# planner.md section 2: GEMM with H100 constants on five other devices, and the model against real serving runs
ZERO_CALIBRATION = ErrorBand(operation=0.20, tpot=0.30, ttft=0.50)


@dataclass(frozen=True, eq=False)
class Device:
    """One accelerator (or CPU). flops in 1/s by dtype, memory_bandwidth in bytes/s; `cores` is the number of cores that share
    the work; `price_per_hour` in dollars where the user gave one. Compared and hashed by identity, so usable as a cache key."""

    name: str
    flops: Mapping[str, float]
    memory_bandwidth: float
    capacity_bytes: int
    scale_up: Link
    scale_out: Link
    per_node: int = 8
    cores: int = 132
    gemm: Mapping[str, Roofline] = field(default_factory=dict)
    prefill: PrefillFit = PrefillFit(12.2e-6, 0.69, 0.42, 0.86, 0.50)
    decode: DecodeFit = DecodeFit(11.7e-6, 0.93, 1.6e-8)
    moe: Mapping[str, MoeFit] = field(default_factory=dict)  # by routing, and by routing and shape
    elementwise: Roofline = Roofline(3e-6, 1.0, 0.75)
    collectives: Mapping[str, Mapping[int, Link]] = field(default_factory=dict)
    samples: str | Mapping[str, Any] | None = None  # measured, as the entry has them: see `samples.py`
    tables: Mapping[str, Table] = field(default_factory=dict)  # of the samples
    tried: Mapping[str, Tried] = field(default_factory=dict)  # by family
    calibrated: bool = False
    band: ErrorBand = ZERO_CALIBRATION
    price_per_hour: float | None = None
    source: str = ""
    platform: str = "cuda"  # cuda and cpu are what the engine runs on
    like: str = ""  # the device whose constants it borrows, and which those are
    borrowed: tuple[str, ...] = ()
    engine: Mapping[str, Any] | None = None  # `calibration.Calibration`, as read: the engine's own steps on this machine

    def peak(self, dtype: str) -> float:
        """Flops per second for `dtype`, or for the next wider one that the device computes in."""
        if dtype not in DTYPE_BYTES:
            raise ConfigError(f"dtype {dtype!r} is unknown: it must be one of {', '.join(sorted(DTYPE_BYTES))}.")
        while dtype not in self.flops and dtype in _WIDER:
            dtype = _WIDER[dtype]
        if dtype in self.flops:
            return self.flops[dtype]
        return max(self.flops.values()) / 2  # float32 where the table starts at 16 bits: tensor units run TF32 at half the rate

    def corrected(self, family: str, seconds: float, *args: float, near: float = 1.0) -> Price:
        """A formula's seconds at `args`, moved to the measured samples of `family` where the device carries them.

        near: 1 for the very operation that was measured, less for one that resembles it, 0 for another.
        """
        table, tried, share = self.tables.get(family), self.tried.get(family), 0.0
        if table and near > 0:
            log, share = table.correction(args)
            seconds, share = seconds * math.exp(near * log), near * share
        if tried is None:
            return Price(seconds, share * seconds)
        error = tried.formula if tried.table is None else (1 - share) * tried.formula + share * tried.table
        return Price(seconds, share * seconds, seconds, error * seconds)

    def roofline(self, dtype: str) -> Roofline:
        """The GEMM constants for `dtype`; those of bfloat16 where it has none of its own."""
        return self.gemm.get(dtype) or self.gemm.get("bfloat16") or Roofline(3.9e-6, 0.80, 0.86)

    def experts(self, routing: str, shape: str = "") -> MoeFit:
        """The constants of a fused MoE layer under `routing` ("balanced", "skewed"); those of the very `shape` where it was measured."""
        keys = (f"{routing} {shape}", f"balanced {shape}", routing, "balanced")
        found = next((self.moe[key] for key in keys if key in self.moe), None)
        return found or MoeFit(30.8e-6, 0.68, 0.89, 0.28, pass_efficiency=0.54)


@dataclass(frozen=True, eq=False)
class Cluster:
    """`nodes` machines of `devices_per_node` equal devices. `intra` joins devices of a node, `inter` devices of two nodes."""

    nodes: int
    devices_per_node: int
    device: Device
    intra: Link
    inter: Link

    @property
    def devices(self) -> int:
        return self.nodes * self.devices_per_node

    def __str__(self) -> str:
        return f"{self.nodes}x{self.devices_per_node}x{self.device.name}"

    def with_links(self, intra: Link | None = None, inter: Link | None = None) -> Cluster:
        """The same cluster over another fabric; what was measured over the old one is dropped with it."""
        kept = {} if intra else measured_inside(self.device.collectives) if inter else self.device.collectives
        device = replace(self.device, collectives=kept)
        return replace(self, device=device, intra=intra or self.intra, inter=inter or self.inter)


def measured_inside(collectives: Mapping[str, Mapping[int, Link]]) -> Mapping[str, Mapping[int, Link]]:
    """Those that no other fabric between nodes makes wrong: all but the exchanges of experts over several nodes."""
    return {op: {n: link for n, link in fits.items() if not op.startswith("deepep") or n == 1} for op, fits in collectives.items()}


def make_cluster(device: Device, nodes: int = 1, devices_per_node: int | None = None) -> Cluster:
    """A cluster of catalogue devices over the device's own links."""
    per_node = device.per_node if devices_per_node is None else devices_per_node
    for name, count in (("nodes", nodes), ("devices per node", per_node)):
        if count < 1:
            raise ConfigError(f"{name} is {count}: a cluster has at least 1.")
    return Cluster(nodes, per_node, device, device.scale_up, device.scale_out)
