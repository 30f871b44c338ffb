"""The measured samples of a device's entry, as tables: a family's is made when its first price is asked for.

An entry has them under `samples`, {family: [[argument, ..., seconds], ...]}, or names a packed file of the same in `data`. The
families and their arguments are those of `families.py`; `lockstep calibrate` writes them, and for the shipped devices
scripts/fit_planner.py, of which docs/planner.md#samples names the sources.
"""

from __future__ import annotations

import gzip
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import msgspec

from lockstep.config.errors import ConfigError
from lockstep.planner import families
from lockstep.planner.families import Sample
from lockstep.planner.hardware import Device
from lockstep.planner.tables import Table

ROWS = list[list[int | float]]
FOLDER = Path(__file__).parent / "data" / "samples"


class Tables(Mapping[str, Table]):
    """The tables of a device by family. Corrections are to the formulas of `device`, as it was without them."""

    def __init__(self, device: Device, samples: str | Mapping[str, Any], without: Collection[str] = ()) -> None:
        self._device, self._samples = device, samples
        self._made: dict[str, Table | None] = dict.fromkeys(without)

    @cached_property
    def _rows(self) -> Mapping[str, Any]:
        """Rows by family; those of a file are still packed."""
        return read(FOLDER / self._samples) if isinstance(self._samples, str) else self._samples

    def get(self, family: str, default: Any = None) -> Any:
        """The table of a family, or `default`."""
        try:
            return self._made[family] or default
        except KeyError:
            self._made[family] = self._make(family) if family in self._rows else None
            return self._made[family] or default

    def _make(self, family: str) -> Table:
        raw = self._rows[family]
        rows = msgspec.json.decode(raw, type=ROWS) if isinstance(raw, msgspec.Raw) else checked(self._device.name, family, raw)
        return families.table_of(families.named(family), self._device, rows)

    def __getitem__(self, family: str) -> Table:
        found = self.get(family)
        if found is None:
            raise KeyError(family)
        table: Table = found
        return table

    def __iter__(self) -> Iterator[str]:
        return iter(self._rows)

    def __len__(self) -> int:
        return len(self._rows)


def attached(device: Device, without: Collection[str] = ()) -> Device:
    """The device with the tables of its samples, but of families `without`: those of another link.

    Raises ConfigError for a family that is none, or a file that is not there.
    """
    if not device.samples:
        return device
    if isinstance(device.samples, str):
        if not (FOLDER / device.samples).is_file():
            raise ConfigError(f"device {device.name}: samples is {device.samples!r}: it must be a mapping, or a file in {FOLDER}.")
    elif not isinstance(device.samples, Mapping):
        raise ConfigError(
            f"device {device.name}: samples is a {type(device.samples).__name__}: write {{family: [[argument, ..., seconds]]}}."
        )
    else:
        for family, rows in device.samples.items():
            checked(device.name, family, rows)
    return replace(device, tables=Tables(replace(device, tables={}), device.samples, without))


def checked(device: str, family: str, rows: Any) -> list[list[float]]:
    """The rows, every one of as many positive numbers as the family's samples have. Raises ConfigError naming what is wrong."""
    where = f"device {device}: samples of {family!r}"
    try:
        count = families.named(family).arguments + 1
    except ValueError as error:
        raise ConfigError(f"{where}: {error}") from None
    try:
        found = msgspec.convert(rows, ROWS)
    except msgspec.ValidationError as error:
        raise ConfigError(f"{where} are no lists of numbers ({error}): run `lockstep calibrate` again, or leave them out.") from None
    for row in found:
        if len(row) != count or min(row) <= 0:
            raise ConfigError(f"{where}: {row} is not {count - 1} positive arguments and the seconds: correct it, or leave it out.")
    if not found:
        raise ConfigError(f"{where} are none: leave the family out.")
    return found


def rows_of(found: Sequence[Sample]) -> list[list[float]]:
    """As an entry has them."""
    return [[*sample.args, float(f"{sample.seconds:.5g}")] for sample in found]


def read(path: Path) -> dict[str, msgspec.Raw]:
    """Rows by family of a packed file."""
    return unpacked(path.read_bytes())


def unpacked(data: bytes) -> dict[str, msgspec.Raw]:
    """Rows by family of what `packed` made, on this machine or on another."""
    return msgspec.json.decode(gzip.decompress(data), type=dict[str, msgspec.Raw])


def packed(rows: Mapping[str, Sequence[Sequence[float]]]) -> bytes:
    """The file of these rows; the same for the same rows, and the same build of zlib."""
    return gzip.compress(msgspec.json.encode(rows), mtime=0)
