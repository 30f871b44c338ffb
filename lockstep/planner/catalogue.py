"""Devices and clusters by name or file: 2x8xH100, 8xH200, A100, cpu, or the path of a YAML or JSON file.

Names come from `data/devices.json` (made by scripts/fit_planner.py) and from the user's folder of calibrated devices, which
wins: what was measured here is better than what was measured elsewhere.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from lockstep.config.errors import ConfigError
from lockstep.planner.entry import from_entry, link_of
from lockstep.planner.hardware import Cluster, Device, make_cluster
from lockstep.planner.quantity import COUNT, mapping, read
from lockstep.utils import env

SHIPPED = Path(__file__).parent / "data" / "devices.json"
_CLUSTER = re.compile(r"(?:([0-9]{1,9})[xX])?(?:([0-9]{1,9})[xX])?([A-Za-z][\w.+-]*)")
_FILES = (".yaml", ".yml", ".json")

FORM = "A cluster is NODESxDEVICESxDEVICE, as in 2x8xH100 or 8xH200, or the name of a YAML file."


def cluster(text: str) -> Cluster:
    """ "2x8xH100": 2 nodes of 8; "8xH200": one node of 8; "H100": one device; or a file. Raises ConfigError for what is neither."""
    text = text.strip()
    if text.endswith(_FILES):
        return cluster_file(Path(text))
    found = _CLUSTER.fullmatch(text)
    if not found:
        raise ConfigError(f"cluster {text!r} cannot be read. {FORM}")
    first, second, name = found.groups()
    nodes, per_node = (int(first), int(second)) if second else (1, int(first or 1))
    try:
        found_device = device(name)
    except ConfigError as e:
        raise ConfigError(f"cluster {text!r}: {e} {FORM}") from None
    made = make_cluster(found_device, nodes, per_node)
    most = made.device.per_node
    if per_node > most:
        better = f"{made.devices // most}x{most}x{name}" if made.devices % most == 0 else f"{nodes}x{most}x{name}"
        raise ConfigError(
            f"cluster {text!r} has {per_node} devices in a node, and nodes of {made.device.name} have {most}: did you mean {better}? "
            "A YAML file with devices_per_node may say otherwise."
        )
    return made


def device(name: str) -> Device:
    """A device by its name or an alias, in any case. Raises ConfigError, listing the names, for one that nobody described."""
    own = user_file(name)
    if own.exists():
        return _device_of(own, own.stat().st_mtime_ns)
    if name.lower() == "this":
        raise ConfigError("device 'this' is this machine, which is not calibrated yet: run `lockstep calibrate` first.")
    return _shipped(name.upper())


@cache
def _shipped(name: str) -> Device:
    entry = _entries().get(name)
    if entry is None:
        raise ConfigError(
            f"device {name!r} is not in the catalogue, which has {', '.join(names())}: describe it by six numbers in a YAML file "
            "(docs/planner.md), or run `lockstep calibrate` on it."
        )
    return from_entry(entry, device_shipped)


def device_shipped(name: str) -> Device:
    """A device of the shipped catalogue, whatever was calibrated here."""
    return _shipped(name.upper())


@cache
def _entries() -> dict[str, dict[str, Any]]:
    """Entries by name and by alias, in capitals."""
    entries = json.loads(SHIPPED.read_text(encoding="utf-8"))["devices"]
    return {alias.upper(): entry for entry in entries for alias in (entry["name"], *entry.get("aliases", ()))}


def names() -> list[str]:
    """The shipped devices, by their first names."""
    return sorted({entry["name"] for entry in _entries().values()})


def user_file(name: str) -> Path:
    """Where a device that was calibrated here is kept."""
    return env.cache_folder() / "devices" / f"{name.lower()}.json"


@cache
def _device_of(path: Path, changed: int) -> Device:
    """The device of a file as it was at `changed`."""
    del changed
    return from_entry(_read(path), device_shipped)


def cluster_file(path: Path) -> Cluster:
    """A file with `device` (a name, or an entry) and optionally nodes, devices_per_node, and links that replace the device's own."""
    raw = _read(path)
    if "device" not in raw:
        return make_cluster(from_entry(raw, device))  # a device alone: one node of it
    unknown = sorted(set(raw) - {"device", "nodes", "devices_per_node", "intra", "inter"})
    if unknown:
        raise ConfigError(f"{path}: unknown keys {', '.join(unknown)}: a cluster has device, nodes, devices_per_node, intra and inter.")
    entry = raw["device"]
    example = "like: H100, memory_bandwidth: 4e12"
    found = device(entry) if isinstance(entry, str) else from_entry(mapping(str(path), "device", entry, example), device)
    counts = {"nodes": raw.get("nodes", 1), "devices_per_node": raw.get("devices_per_node", found.per_node)}
    made = make_cluster(found, *(int(read(str(path), key, value, COUNT)) for key, value in counts.items()))
    links = {key: link_of(str(path), key, raw[key], getattr(made, key)) for key in ("intra", "inter") if key in raw}
    return made.with_links(**links)


def _read(path: Path) -> Mapping[str, Any]:
    """A JSON or YAML file's mapping. Raises ConfigError for a file that is not there or holds something else."""
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{path} cannot be read ({error.strerror}): give the file of a device or a cluster.") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not a text file ({error}): give the file of a device or a cluster.") from None
    try:
        raw = _parse(path, text)
    except ValueError as error:
        raise ConfigError(f"{path} cannot be read: {error}. Write a mapping with the keys of a device or a cluster.") from None
    if not isinstance(raw, Mapping):
        raise ConfigError(f"{path} holds a {type(raw).__name__}: it must be a mapping with the keys of a device or a cluster.")
    return raw


def _parse(path: Path, text: str) -> Any:
    """JSON or YAML, by the suffix. Raises ValueError for what is neither, in one line."""
    if path.suffix == ".json":
        return json.loads(text)
    import yaml

    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f" in line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise ValueError(f"{getattr(error, 'problem', None) or 'no YAML'}{where}") from None
