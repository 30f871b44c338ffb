"""What a device and a cluster can do: the numbers behind every price, and nothing that measures or fits them.

A device is six data-sheet numbers (flops, memory bandwidth, capacity, and a bandwidth and a latency for each of the two
links) plus fitted constants. Constants that nobody measured on this device are those of the H100, which transfer between
GPUs with a known error; `Device.calibrated` and `Device.band` say which it is.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType

DTYPE_BYTES: Mapping[str, float] = MappingProxyType(
    {"float32": 4.0, "bfloat16": 2.0, "float16": 2.0, "fp8": 1.0, "int8": 1.0, "fp4": 0.5, "int4": 0.5}
)
# A device without units for a dtype computes in the next wider one that it has.
_WIDER = {"fp4": "fp8", "int4": "int8", "fp8": "bfloat16", "int8": "bfloat16", "float16": "bfloat16", "bfloat16": "float32"}


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

    def seconds(self, size_bytes: float, traffic_bytes: float, steps: int = 1) -> float:
        """size_bytes: the message as its owner sees it; traffic_bytes: what each device sends of it."""
        if size_bytes <= 0:
            return 0.0
        rise = size_bytes / (size_bytes + self.knee_bytes)
        return self.launch_s + steps * self.step_s * rise + traffic_bytes / self.bandwidth


@dataclass(frozen=True)
class Roofline:
    """launch_s + max(flop / (peak * flop_efficiency), bytes / (bandwidth * byte_efficiency))."""

    launch_s: float
    flop_efficiency: float
    byte_efficiency: float


@dataclass(frozen=True)
class PrefillFit(Roofline):
    """A roofline whose flops run at full rate only when the tiles fill the device `waves` times over, and rows are long.

    `ramp_tokens`: the prompt length at which half of the peak rate is reached; `tile`: query rows per block of work;
    `wave`: how much of the last, partly filled wave is paid for (0: nothing, 1: all of it).
    """

    ramp_tokens: float = 0.0
    tile: int = 128
    wave: float = 0.0


@dataclass(frozen=True)
class DecodeFit:
    """launch_s + bytes / (bandwidth * byte_efficiency) + a cost for each (sequence, KV head) and each query head of it."""

    launch_s: float
    byte_efficiency: float
    per_head_s: float = 0.0
    per_query_s: float = 0.0


@dataclass(frozen=True)
class MoeFit(Roofline):
    """A roofline over the experts that are expected to be hit, plus a pass over the unrouted tokens (routing, permuting)."""

    pass_launch_s: float = 0.0
    pass_byte_efficiency: float = 1.0


@dataclass(frozen=True)
class ErrorBand:
    """Expected mean absolute error, as a fraction, of one operation, of TPOT and of TTFT."""

    operation: float
    tpot: float
    ttft: float


# planner.md section 2: GEMM with H100 constants on five other devices, and the model against real serving runs
ZERO_CALIBRATION = ErrorBand(operation=0.20, tpot=0.30, ttft=0.50)


@dataclass(frozen=True, eq=False)
class Device:
    """One accelerator (or CPU). flops in 1/s by dtype, memory_bandwidth in bytes/s; `sms` is the number of cores that share
    the work; `price_per_hour` in dollars where the user gave one. Compared and hashed by identity, so usable as a cache key."""

    name: str
    flops: Mapping[str, float]
    memory_bandwidth: float
    capacity_bytes: int
    scale_up: Link
    scale_out: Link
    per_node: int = 8
    sms: int = 132
    gemm: Mapping[str, Roofline] = field(default_factory=dict)
    prefill: PrefillFit = PrefillFit(12.6e-6, 0.70, 0.80)
    decode: DecodeFit = DecodeFit(11.5e-6, 0.92)
    moe: MoeFit = MoeFit(12e-6, 0.70, 0.80)
    elementwise: Roofline = Roofline(3e-6, 1.0, 0.75)
    collectives: Mapping[str, Mapping[int, Link]] = field(default_factory=dict)
    calibrated: bool = False
    band: ErrorBand = ZERO_CALIBRATION
    price_per_hour: float | None = None
    source: str = ""

    def peak(self, dtype: str) -> float:
        """Flops per second for `dtype`, or for the next wider one that the device computes in."""
        while dtype not in self.flops:
            if dtype not in _WIDER:
                raise ValueError(f"dtype {dtype!r}: {self.name} lists no flops for it: give `flops` with one of {sorted(DTYPE_BYTES)}.")
            dtype = _WIDER[dtype]
        return self.flops[dtype]

    def roofline(self, dtype: str) -> Roofline:
        """The GEMM constants for `dtype`; those of bfloat16 where it has none of its own."""
        return self.gemm.get(dtype) or self.gemm.get("bfloat16") or Roofline(3.9e-6, 0.80, 0.86)


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
        """The same cluster over another fabric; measured collectives of the old inner link are dropped with it."""
        device = self.device if intra is None else replace(self.device, collectives={})
        return replace(self, device=device, intra=intra or self.intra, inter=inter or self.inter)


def make_cluster(device: Device, nodes: int = 1, devices_per_node: int | None = None) -> Cluster:
    """A cluster of catalogue devices over the device's own links."""
    per_node = devices_per_node or device.per_node
    for name, count in (("nodes", nodes), ("devices per node", per_node)):
        if count < 1:
            raise ValueError(f"{name} is {count}: a cluster has at least 1.")
    return Cluster(nodes, per_node, device, device.scale_up, device.scale_out)
