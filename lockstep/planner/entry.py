"""A device as a catalogue entry and back: the same few keys in the shipped JSON, in a user's YAML, and from `lockstep calibrate`.

    name: MyGPU
    flops: {bfloat16: 400e12}
    memory_bandwidth: 2.0e12        # bytes/s
    capacity_bytes: 68719476736
    scale_up: {bandwidth: 200e9, latency_s: 4e-6}
    scale_out: {bandwidth: 25e9, latency_s: 20e-6}

These are the six numbers (bandwidths in bytes/s, one direction, per device); everything else has a default: constants that
nobody measured are those of the device named by `like` (H100), and the prediction says so.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from typing import Any

from lockstep.config.errors import ConfigError
from lockstep.planner.hardware import (
    DTYPE_BYTES,
    ZERO_CALIBRATION,
    DecodeFit,
    Device,
    ErrorBand,
    Link,
    MoeFit,
    PrefillFit,
    Roofline,
)

LIKE = "H100"
_NEEDED = ("name", "flops", "memory_bandwidth", "capacity_bytes", "scale_up")
KERNELS = {
    "gemm": "products", "prefill": "prefill attention", "decode": "decode attention", "moe": "experts", "elementwise": "small kernels",
}  # fmt: skip
_OPTIONAL = ("scale_out", "per_node", "cores", "price_per_hour", "source", "like", "calibrated", "band", "fits", "aliases", "engine")


def from_entry(entry: Mapping[str, Any], lookup: Callable[[str], Device]) -> Device:
    """The device of an entry; `lookup` finds the one whose constants it borrows. Raises ConfigError naming the key that is wrong."""
    name = str(entry.get("name", "?"))
    missing = [key for key in _NEEDED if key not in entry]
    unknown = sorted(set(entry) - {*_NEEDED, *_OPTIONAL})
    if missing or unknown:
        wrong = f"lacks {', '.join(missing)}" if missing else f"has unknown keys {', '.join(unknown)}"
        raise ConfigError(f"device {name}: the entry {wrong}: it needs {', '.join(_NEEDED)} and may have {', '.join(_OPTIONAL)}.")
    flops = entry["flops"] if isinstance(entry["flops"], Mapping) else {"bfloat16": entry["flops"]}
    for dtype in flops:
        if dtype not in DTYPE_BYTES:
            raise ConfigError(f"device {name}: flops lists {dtype!r}: it must be one of {', '.join(sorted(DTYPE_BYTES))}.")
    up = link_of(name, "scale_up", entry["scale_up"])
    bare = Device(
        name=name,
        flops={dtype: _positive(name, f"flops of {dtype}", value) for dtype, value in flops.items()},
        memory_bandwidth=_positive(name, "memory_bandwidth", entry["memory_bandwidth"]),
        capacity_bytes=int(_positive(name, "capacity_bytes", entry["capacity_bytes"])),
        scale_up=up,
        scale_out=link_of(name, "scale_out", entry["scale_out"]) if "scale_out" in entry else up,
        per_node=int(_positive(name, "per_node", entry.get("per_node", 8))),
        cores=int(_positive(name, "cores", entry.get("cores", 132))),
        price_per_hour=entry.get("price_per_hour"),
        calibrated=bool(entry.get("calibrated", False)),
        band=ErrorBand(**entry["band"]) if "band" in entry else ZERO_CALIBRATION,
        source=str(entry.get("source", "")),
        engine=entry.get("engine"),
    )
    like = entry.get("like", LIKE)
    return _with_fits(_borrow(bare, lookup(like)) if like and like != name else bare, entry.get("fits", {}))


def _positive(name: str, key: str, value: Any) -> float:
    try:
        number = float(value)  # YAML reads 4e12 without a dot as text
    except (TypeError, ValueError):
        number = 0.0
    if not number > 0:
        raise ConfigError(f"device {name}: {key} is {value!r}: it must be a number above 0.")
    return number


def link_of(name: str, key: str, raw: Mapping[str, Any]) -> Link:
    """Of a bandwidth and a latency, or of all four constants."""
    if "launch_s" in raw:
        return Link(float(raw["launch_s"]), float(raw["step_s"]), float(raw["bandwidth"]), float(raw.get("knee_bytes", 0.0)))
    if "bandwidth" not in raw or "latency_s" not in raw:
        raise ConfigError(f"device {name}: {key} is {dict(raw)}: it needs `bandwidth` (bytes/s, one direction) and `latency_s`.")
    latency = _positive(name, f"{key} latency_s", raw["latency_s"])
    return Link(latency * (1 - STEP_SHARE), latency * STEP_SHARE, _positive(name, f"{key} bandwidth", raw["bandwidth"]))


# Of a message's latency, what every further step of a ring pays again: an all-reduce of two ranks on two nodes (two steps)
# starts 1.7 times as late as one message does (vidur, A100).
STEP_SHARE = 0.7


def _borrow(device: Device, like: Device) -> Device:
    """The device with another's constants: efficiencies and launches as they are, since rooflines scale by the data sheet."""
    lent = {key: getattr(like, key) for key in KERNELS}
    return replace(device, **lent, like=like.name, borrowed=tuple(KERNELS.values()))


def _with_fits(device: Device, fits: Mapping[str, Any]) -> Device:
    """The device with the constants of `fits`, the others as they were."""
    found: dict[str, Any] = {}
    for key, kind in (("prefill", PrefillFit), ("decode", DecodeFit), ("elementwise", Roofline)):
        if key in fits:
            found[key] = kind(**fits[key])
    for key, kind in (("gemm", Roofline), ("moe", MoeFit)):
        if key in fits:
            found[key] = {**getattr(device, key), **{name: kind(**constants) for name, constants in fits[key].items()}}
    if "collectives" in fits:
        ranks = {op: {int(n): Link(**link) for n, link in by_ranks.items()} for op, by_ranks in fits["collectives"].items()}
        found["collectives"] = {**device.collectives, **ranks}
    left = tuple(words for key, words in KERNELS.items() if key not in fits and words in device.borrowed)
    return replace(device, **found, borrowed=left)


def to_entry(device: Device) -> dict[str, Any]:
    """The entry that `from_entry` makes the device from again; all its constants are written out."""
    raw = asdict(replace(device, tables={}))
    fits = {key: raw.pop(key) for key in ("gemm", "prefill", "decode", "moe", "elementwise", "collectives")}
    raw.pop("borrowed")
    raw.pop("tables")  # samples are not constants: whoever measured keeps them
    fits["collectives"] = {op: {str(n): link for n, link in by_ranks.items()} for op, by_ranks in fits["collectives"].items()}
    return {key: value for key, value in raw.items() if value is not None} | {"like": "", "fits": fits}
