"""A device as a catalogue entry and back: the same few keys in the shipped JSON, in a user's YAML, and from `lockstep calibrate`.

    name: MyGPU
    flops: {bfloat16: 400e12}
    memory_bandwidth: 2.0e12        # bytes/s
    capacity_bytes: 68719476736
    scale_up: {bandwidth: 200e9, latency_s: 4e-6}
    scale_out: {bandwidth: 25e9, latency_s: 20e-6}

These are the six numbers (bandwidths in bytes/s, one direction, per device); everything else has a default: constants that
nobody measured are those of the H100, and the prediction says so. An entry with `like: NAME` is that device with other numbers: it
needs only those that differ. Sizes may be written with units, as in 64GiB or 2TB/s (`quantity.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from typing import Any

from lockstep.config.errors import ConfigError
from lockstep.planner import quantity, samples
from lockstep.planner.collectives import BETWEEN
from lockstep.planner.hardware import (
    DTYPE_BYTES,
    STEP_SHARE,
    ZERO_CALIBRATION,
    DecodeFit,
    Device,
    ErrorBand,
    Link,
    MoeFit,
    PrefillFit,
    Roofline,
    Tried,
    measured_inside,
)

LIKE = "H100"
_NEEDED = ("name", "flops", "memory_bandwidth", "capacity_bytes", "scale_up")
KERNELS = {
    "gemm": "products", "prefill": "prefill attention", "decode": "decode attention", "moe": "experts", "elementwise": "small kernels",
}  # fmt: skip
_OPTIONAL = (
    *("scale_out", "per_node", "cores", "price_per_hour", "source", "like", "calibrated", "band", "fits", "aliases", "engine"),
    *("platform", "samples", "tried"),
)
LINK = "bandwidth: 25e9, latency_s: 20e-6"


def from_entry(entry: Mapping[str, Any], lookup: Callable[[str], Device]) -> Device:
    """The device of an entry; `lookup` finds the one whose constants it borrows. Raises ConfigError naming the key that is wrong."""
    name = str(entry.get("name", "?"))
    if entry.get("like") and any(key not in entry for key in _NEEDED):
        base, elsewhere = lookup(str(entry["like"])), "scale_out" in entry and "samples" not in entry
        found = _still(base, from_entry(_changed(base, entry), lookup))
        return samples.attached(found, without=(BETWEEN,)) if elsewhere else found
    missing = [key for key in _NEEDED if key not in entry]
    unknown = sorted(set(entry) - {*_NEEDED, *_OPTIONAL})
    if missing or unknown:
        wrong = f"lacks {', '.join(missing)}" if missing else f"has unknown keys {', '.join(unknown)}"
        raise ConfigError(f"device {name}: the entry {wrong}: it needs {', '.join(_NEEDED)} and may have {', '.join(_OPTIONAL)}.")
    flops = entry["flops"] if isinstance(entry["flops"], Mapping) else {"bfloat16": entry["flops"]}
    for dtype in flops:
        if dtype not in DTYPE_BYTES:
            raise ConfigError(f"device {name}: flops lists {dtype!r}: it must be one of {', '.join(sorted(DTYPE_BYTES))}.")
    where = f"device {name}"
    up = link_of(where, "scale_up", entry["scale_up"])
    bare = Device(
        name=name,
        flops={str(dtype): quantity.read(where, f"flops of {dtype}", value, quantity.FLOPS) for dtype, value in flops.items()},
        memory_bandwidth=quantity.read(where, "memory_bandwidth", entry["memory_bandwidth"], quantity.MEMORY_BANDWIDTH),
        capacity_bytes=int(quantity.read(where, "capacity_bytes", entry["capacity_bytes"], quantity.CAPACITY)),
        scale_up=up,
        scale_out=link_of(where, "scale_out", entry["scale_out"]) if "scale_out" in entry else up,
        per_node=int(quantity.read(where, "per_node", entry.get("per_node", 8), quantity.COUNT)),
        cores=int(quantity.read(where, "cores", entry.get("cores", 132), quantity.COUNT)),
        price_per_hour=_price(where, entry.get("price_per_hour")),
        calibrated=bool(entry.get("calibrated", False)),
        source=str(entry.get("source", "")),
        engine=entry.get("engine"),
        platform=str(entry.get("platform", "cpu" if entry.get("engine") else "cuda")),
    )
    like = entry.get("like", LIKE)
    try:
        band = _band(where, entry["band"]) if "band" in entry else ZERO_CALIBRATION
        tried = {str(family): Tried(**errors) for family, errors in entry.get("tried", {}).items()}
        whole = _with_fits(replace(_borrow(bare, lookup(like)) if like and like != name else bare, band=band), entry.get("fits", {}))
    except (TypeError, AttributeError, KeyError) as error:
        raise ConfigError(f"{where}: band, fits or tried are not what `lockstep calibrate` writes ({error}): leave them out.") from None
    return samples.attached(replace(whole, samples=entry.get("samples"), tried=tried))


def _changed(base: Device, entry: Mapping[str, Any]) -> dict[str, Any]:
    """A whole entry of another device with this entry's numbers. What was measured on it stays where it is about something else."""
    kept = replace(base, collectives=measured_inside(base.collectives)) if "scale_out" in entry else base
    found = {**to_entry(kept), "name": f"MY-{base.name}", "source": f"{base.name} with other numbers", **entry, "like": ""}
    if "scale_up" in entry:
        found["fits"] = {**found["fits"], "collectives": {}}
    if {"flops", "memory_bandwidth", "scale_up", "cores"} & set(entry):
        found |= {"calibrated": False, "band": asdict(ZERO_CALIBRATION), "tried": {}, "samples": None} | {
            key: entry[key] for key in ("calibrated", "band", "tried", "samples") if key in entry
        }
    for key, own in (("scale_up", base.scale_up), ("scale_out", base.scale_out)):
        if key in entry:
            found[key] = asdict(link_of(str(found["name"]), key, entry[key], own))
    return found


def _still(base: Device, changed: Device) -> Device:
    """The device with a word on whose constants these are: of its base, and what that borrowed is borrowed still."""
    if base.calibrated and not changed.calibrated:
        return replace(changed, like=base.name, borrowed=tuple(KERNELS.values()))
    return replace(changed, like=base.like if base.borrowed else base.name, borrowed=base.borrowed)


def _band(where: str, raw: Any) -> ErrorBand:
    """Expected errors, each more than none: a price without one is taken for what nobody knows the error of."""
    found = quantity.mapping(where, "band", raw, "operation: 0.2, tpot: 0.3, ttft: 0.5")
    return ErrorBand(**{key: quantity.read(where, f"band {key}", value, quantity.SHARE) for key, value in found.items()})


def _price(where: str, value: Any) -> float | None:
    """Dollars per hour; 0 is a price."""
    return value if value is None else 0.0 if value == 0 else quantity.read(where, "price_per_hour", value, quantity.PRICE)


def link_of(where: str, key: str, raw: Any, own: Link | None = None) -> Link:
    """Of a bandwidth and a latency, of all four constants, or, where there is a link to change, {scale: 0.5}: half of its bandwidth."""
    raw = quantity.mapping(where, key, raw, LINK + ("} or {scale: 0.5" if own else ""))
    if "scale" in raw and own is not None and len(raw) == 1:
        return own.scaled(quantity.read(where, f"{key} scale", raw["scale"], quantity.FACTOR))
    latency = "launch_s" if "launch_s" in raw else "latency_s"
    unknown = sorted(
        set(map(str, raw)) - ({"launch_s", "step_s", "bandwidth", "knee_bytes"} if "launch_s" in raw else {"bandwidth", "latency_s"})
    )
    if unknown or "bandwidth" not in raw or latency not in raw:
        raise ConfigError(f"{where}: {key} is {dict(raw)}: it needs `bandwidth` (bytes/s, one direction) and `latency_s` (seconds).")
    bandwidth = quantity.read(where, f"{key} bandwidth", raw["bandwidth"], quantity.LINK_BANDWIDTH)
    if latency == "launch_s":
        return Link(
            _constant(where, key, raw, "launch_s"),
            _constant(where, key, raw, "step_s"),
            bandwidth,
            _constant(where, key, raw, "knee_bytes"),
        )
    seconds = quantity.read(where, f"{key} latency_s", raw["latency_s"], quantity.LATENCY)
    return Link(seconds * (1 - STEP_SHARE), seconds * STEP_SHARE, bandwidth)


def _constant(where: str, key: str, raw: Mapping[str, Any], name: str) -> float:
    """A fitted constant, which may be 0."""
    value = raw.get(name, 0.0)
    rule = quantity.BYTES if name == "knee_bytes" else quantity.LATENCY
    return 0.0 if value == 0 else quantity.read(where, f"{key} {name}", value, rule)


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
    raw.pop("tables")  # made of the samples
    fits["collectives"] = {op: {str(n): link for n, link in by_ranks.items()} for op, by_ranks in fits["collectives"].items()}
    return {key: value for key, value in raw.items() if value is not None} | {"like": "", "fits": fits}
