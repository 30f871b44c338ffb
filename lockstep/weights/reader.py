"""Safetensors files read by offset: only the bytes asked for leave the disk, and they are counted.

The format (huggingface.co/docs/safetensors): 8 bytes little-endian header length, a JSON header `{name: {dtype, shape,
data_offsets}}` with offsets relative to the end of the header, then the tensors, row-major. Plain positioned reads
instead of a memory map: the count is exact, and a rank's memory holds no pages of other ranks' weights.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lockstep.weights.errors import WeightError

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_MAX_HEADER_BYTES = 100_000_000  # the format's own limit
_CHUNK_BYTES = 16 << 20
_REMEDY = "download the file again"


@dataclass(frozen=True)
class Entry:
    """One tensor of a file. `start` is its first byte counted from the beginning of the file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    nbytes: int


class SafetensorsFile:
    """An open safetensors file. `bytes_read` counts tensor bytes, `header_bytes` those of the header. Close it after use."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.bytes_read = 0
        try:
            self._fd = os.open(path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))
        except OSError as e:
            raise WeightError(f"{path} cannot be opened ({e.strerror}): check that the file exists and can be read.") from None
        try:
            self.entries, self.header_bytes = self._read_header()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Close the file. May be called twice."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def __enter__(self) -> SafetensorsFile:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _read_header(self) -> tuple[dict[str, Entry], int]:
        size = os.fstat(self._fd).st_size
        head = os.pread(self._fd, 8, 0)
        length = int.from_bytes(head, "little")
        if len(head) < 8 or length > _MAX_HEADER_BYTES or 8 + length > size:
            raise WeightError(f"{self.path} ({size} bytes) is not a whole safetensors file: {_REMEDY}.")
        try:
            raw = json.loads(os.pread(self._fd, length, 8))
            fields = {name: field for name, field in raw.items() if name != "__metadata__"}
            entries = {name: self._entry(name, field, 8 + length) for name, field in fields.items()}
        except (ValueError, KeyError, TypeError, AttributeError) as e:
            if isinstance(e, WeightError):
                raise
            raise WeightError(f"{self.path} has a damaged safetensors header ({type(e).__name__}: {e}): {_REMEDY}.") from None
        end = max((entry.start + entry.nbytes for entry in entries.values()), default=8 + length)
        if end > size:
            raise WeightError(f"{self.path} is cut short: its header promises {end} bytes, it has {size}: {_REMEDY}.")
        return entries, 8 + length

    def _entry(self, name: str, field: dict[str, Any], data_start: int) -> Entry:
        first, last = (int(offset) for offset in field["data_offsets"])
        shape = tuple(int(n) for n in field["shape"])
        dtype = str(field["dtype"])
        if first < 0 or last < first or min(shape, default=0) < 0:
            raise WeightError(f"{self.path}: tensor {name!r} has impossible offsets [{first}, {last}): {_REMEDY}.")
        if dtype in DTYPES and last - first != math.prod(shape) * DTYPES[dtype].itemsize:
            raise WeightError(f"{self.path}: tensor {name!r} of {dtype} {list(shape)} has {last - first} bytes: {_REMEDY}.")
        return Entry(name, dtype, shape, data_start + first, last - first)

    def read_into(self, entry: Entry, dim: int, start: int, dest: Tensor, tick: Callable[[int], None] | None = None) -> None:
        """Fill `dest` with `entry.narrow(dim, start, dest.shape[dim])`, converted to dest's type and device.

        Reads those bytes only. `tick(nbytes)` is called as they arrive, at least every 16 MiB.
        Raises WeightError when the element type is not a float type or the file ends early.
        """
        if entry.dtype not in DTYPES:
            raise WeightError(
                f"{self.path}: tensor {entry.name!r} has type {entry.dtype}, but {', '.join(DTYPES)} are supported:"
                " use a checkpoint that is not quantised."
            )
        dtype = DTYPES[entry.dtype]
        for rows, offsets, run_bytes in self._blocks(entry, dim, start, dest):
            part = dest[rows] if dest.dim() else dest
            # Bytes go straight into the parameter where it has the file's type and is contiguous in host memory.
            direct = part.dtype == dtype and part.device.type == "cpu" and part.is_contiguous()
            staging = part if direct else torch.empty(part.shape, dtype=dtype)
            view = staging.reshape(-1).view(torch.uint8).numpy().data
            for i, offset in enumerate(offsets):
                self._pread(view[i * run_bytes : (i + 1) * run_bytes], offset, entry.name)
            if not direct:
                part.copy_(staging)
            if tick is not None:
                tick(len(view))

    def _blocks(self, entry: Entry, dim: int, start: int, dest: Tensor) -> Iterator[tuple[slice, list[int], int]]:
        """Blocks of rows of `dest`, each with the file offsets of its contiguous runs and their length in bytes.

        Rows cut whole (dim 0) are one run; a cut of dim 1 gives one run per row.
        """
        itemsize = DTYPES[entry.dtype].itemsize
        if dest.numel() == 0:
            return
        if dest.dim() == 0:
            yield slice(None), [entry.start], itemsize
            return
        file_row_bytes = math.prod(entry.shape[1:]) * itemsize
        row_bytes = math.prod(dest.shape[1:]) * itemsize
        step = max(1, _CHUNK_BYTES // row_bytes)
        for first in range(0, dest.shape[0], step):
            rows = slice(first, min(first + step, dest.shape[0]))
            count = rows.stop - rows.start
            if dim == 0 or row_bytes == file_row_bytes:
                skipped = (start if dim == 0 else 0) + first
                yield rows, [entry.start + skipped * file_row_bytes], count * row_bytes
            else:
                assert dim == 1, "only dims 0 and 1 of a checkpoint tensor are cut"
                inside = start * math.prod(entry.shape[2:]) * itemsize
                yield rows, [entry.start + row * file_row_bytes + inside for row in range(rows.start, rows.stop)], row_bytes

    def _pread(self, view: memoryview, offset: int, name: str) -> None:
        done = 0
        while done < len(view):
            got = os.preadv(self._fd, [view[done:]], offset + done)
            if got == 0:
                raise WeightError(f"{self.path} ends inside tensor {name!r}: {_REMEDY}.")
            done += got
        self.bytes_read += done
