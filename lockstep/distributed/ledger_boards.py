"""Where ranks write what they are about to do, so that the others can compare: shared memory on one host, else the store.

A board keeps, per rank and group, the records of the last two collectives. Two are enough: nobody gets two collectives
ahead of a peer, because each is compared before it starts.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from datetime import timedelta
from typing import Any, NamedTuple, Protocol

from lockstep.utils import procs, shared_files
from lockstep.utils.shm import SharedBytes, fence

_SEPARATOR = "\x1f"


class Record(NamedTuple):
    """One collective of one rank. `digest` covers everything this rank did in this group so far."""

    key: str
    digest: str
    what: str
    site: str
    ranks: tuple[int, ...]

    def encode(self, limit: int) -> bytes:
        text = _SEPARATOR.join((self.digest, self.key, ",".join(map(str, self.ranks)), self.what, self.site))
        return text.encode("utf-8", "replace")[:limit]

    @classmethod
    def decode(cls, raw: bytes) -> Record:
        digest, key, ranks, what, site = (raw.decode("utf-8", "replace").split(_SEPARATOR) + [""] * 4)[:5]
        return cls(key, digest, what, site, tuple(int(rank) for rank in ranks.split(",") if rank))


class Board(Protocol):
    """What the ledger needs. `key` names a group with its members; `number` counts its collectives from 1."""

    def publish(self, key: str, number: int, record: Record, waiting: bool) -> None:
        """Write this rank's record; `waiting`: it waits there until `proceed`."""
        ...

    def proceed(self) -> None:
        """This rank waits no longer."""
        ...

    def read(self, rank: int, key: str, number: int) -> Record | None:
        """That rank's record of that collective, None when it has not entered it."""
        ...

    def last(self, rank: int) -> tuple[int, Record, bool] | None:
        """-> (number, record, waits there), what the rank entered last; None when nothing yet."""
        ...

    def gone(self, rank: int) -> str:
        """Why the rank will never come (it died, or left); empty when it may."""
        ...

    def accuse(self, verdict: str) -> None:
        """Let every rank know."""
        ...

    def verdict(self) -> str:
        """What some rank accused; empty when nobody did."""
        ...

    def close(self) -> None: ...


_HEADER, _VERDICT, _ENTRY, _SLOTS = 64, 2048, 1024, 64
_SLOT = 64 + 2 * _ENTRY
_ROW = _HEADER + _VERDICT + _SLOTS * _SLOT
_PID, _LEFT, _WAITING, _LAST, _ACCUSED = range(5)  # of a row's header; WAITING and LAST: entry index + 1


def _stable_hash(key: str) -> int:
    return int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "little") >> 1 | 1


class SharedMemoryBoard:
    """One row per rank in memory that has no name once all have attached. See `utils.shm` for why no lock is needed."""

    def __init__(self, memory: SharedBytes, rank: int, world_size: int) -> None:
        self.memory, self.rank, self.world_size = memory, rank, world_size
        self._view = memoryview(memory.buffer)
        self._rows = [self._view[r * _ROW : (r + 1) * _ROW] for r in range(world_size)]
        self._heads = [row[:_HEADER].cast("q") for row in self._rows]
        self._slots: list[dict[str, int]] = [{} for _ in range(world_size)]
        self._visible = [False] * world_size
        self._heads[rank][_PID] = os.getpid()

    @staticmethod
    def create_file(world_size: int) -> tuple[str, int]:
        """-> (path, fd) of new shared memory for `attach`; unlink the path when all have."""
        path = shared_files.new_path("ledger")
        fd = os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600)
        os.ftruncate(fd, world_size * _ROW)
        return path, fd

    @classmethod
    def attach(cls, fd: int, rank: int, world_size: int) -> SharedMemoryBoard:
        """Takes `fd` over."""
        return cls(SharedBytes(fd, world_size * _ROW), rank, world_size)

    def ready(self) -> None:
        """All have attached: remember whose process this one can see, to notice its death."""
        self._visible = [procs.alive(head[_PID]) for head in self._heads]

    def publish(self, key: str, number: int, record: Record, waiting: bool) -> None:
        slot = self._slots[self.rank].get(key)
        if slot is None:
            slot = len(self._slots[self.rank])
            assert slot < _SLOTS, f"the ledger has room for {_SLOTS} groups per rank"
            self._slots[self.rank][key] = slot
            self._numbers(self.rank, slot)[0] = _stable_hash(key)
        head, index = self._heads[self.rank], slot * 2 + number % 2
        entry = self._entry(self.rank, index)
        numbers, text = entry[:24].cast("q"), record.encode(_ENTRY - 24)
        numbers[0] += 1
        fence()
        numbers[1], numbers[2] = number, len(text)
        entry[24 : 24 + len(text)] = text
        fence()
        numbers[0] += 1
        head[_LAST] = index + 1
        head[_WAITING] = index + 1 if waiting else 0

    def proceed(self) -> None:
        self._heads[self.rank][_WAITING] = 0

    def read(self, rank: int, key: str, number: int) -> Record | None:
        slot = self._slots[rank].get(key)
        if slot is None:
            slot = self._find(rank, _stable_hash(key))
            if slot is None:
                return None
            self._slots[rank][key] = slot
        found = self._read_entry(rank, slot * 2 + number % 2)
        return found[1] if found is not None and found[0] == number else None

    def last(self, rank: int) -> tuple[int, Record, bool] | None:
        index = self._heads[rank][_LAST] - 1
        found = self._read_entry(rank, index) if index >= 0 else None
        return None if found is None else (*found, self._heads[rank][_WAITING] == index + 1)

    def gone(self, rank: int) -> str:
        if self._heads[rank][_LEFT]:
            return "it left the ledger"
        pid = self._heads[rank][_PID]
        return f"its process {pid} is gone" if self._visible[rank] and not procs.alive(pid) else ""

    def accuse(self, verdict: str) -> None:
        raw = verdict.encode("utf-8", "replace")[:_VERDICT]
        self._rows[self.rank][_HEADER : _HEADER + len(raw)] = raw
        fence()
        self._heads[self.rank][_ACCUSED] = len(raw)

    def verdict(self) -> str:
        for head, row in zip(self._heads, self._rows, strict=True):
            if head[_ACCUSED]:
                return bytes(row[_HEADER : _HEADER + head[_ACCUSED]]).decode("utf-8", "replace")
        return ""

    def close(self) -> None:
        if not self._heads:
            return
        self._heads[self.rank][_LEFT] = 1
        for view in (*self._heads, *self._rows, self._view):
            view.release()
        self._heads, self._rows = [], []
        self.memory.close()

    def _entry(self, rank: int, index: int) -> memoryview:
        start = _HEADER + _VERDICT + (index // 2) * _SLOT + 64 + (index % 2) * _ENTRY
        return self._rows[rank][start : start + _ENTRY]

    def _numbers(self, rank: int, slot: int) -> memoryview:
        start = _HEADER + _VERDICT + slot * _SLOT
        return self._rows[rank][start : start + 64].cast("q")

    def _find(self, rank: int, wanted: int) -> int | None:
        for slot in range(_SLOTS):
            found = self._numbers(rank, slot)[0]
            if found == wanted:
                return slot
            if not found:
                return None
        return None

    def _read_entry(self, rank: int, index: int) -> tuple[int, Record] | None:
        entry = self._entry(rank, index)
        numbers = entry[:24].cast("q")
        version = numbers[0]
        fence()
        number, raw = numbers[1], bytes(entry[24 : 24 + max(0, min(numbers[2], _ENTRY - 24))])
        fence()
        if version % 2 or version == 0 or numbers[0] != version:
            return None  # being written: the caller looks again
        return number, Record.decode(raw)


class StoreBoard:
    """The same over the key-value store: for ranks on several hosts. Slower by the network, right all the same."""

    def __init__(self, store: Any, rank: int) -> None:
        self.store, self.rank = store, rank
        self._written: dict[str, list[str]] = {}

    def _get(self, key: str) -> bytes | None:
        return bytes(self.store.get(key)) if self.store.check([key]) else None

    def publish(self, key: str, number: int, record: Record, waiting: bool) -> None:
        name, raw = f"at/{key}/{self.rank}/{number}", record.encode(1 << 16)
        self.store.set(name, raw)
        self.store.set(f"last/{self.rank}", f"{number}{_SEPARATOR}{int(waiting)}{_SEPARATOR}".encode() + raw)
        written = self._written.setdefault(key, [])
        written.append(name)
        if len(written) > 3:
            self.store.delete_key(written.pop(0))

    def proceed(self) -> None:
        found = self._get(f"last/{self.rank}")
        if found is not None:
            number, _, raw = found.split(_SEPARATOR.encode(), 2)
            self.store.set(f"last/{self.rank}", _SEPARATOR.encode().join((number, b"0", raw)))

    def read(self, rank: int, key: str, number: int) -> Record | None:
        raw = self._get(f"at/{key}/{rank}/{number}")
        return None if raw is None else Record.decode(raw)

    def last(self, rank: int) -> tuple[int, Record, bool] | None:
        found = self._get(f"last/{rank}")
        if found is None:
            return None
        number, waiting, raw = found.split(_SEPARATOR.encode(), 2)
        return int(number), Record.decode(raw), waiting == b"1"

    def gone(self, rank: int) -> str:
        return "it left the ledger" if self.store.check([f"left/{rank}"]) else ""

    def accuse(self, verdict: str) -> None:
        self.store.set("verdict", verdict.encode())

    def verdict(self) -> str:
        return (self._get("verdict") or b"").decode()

    def close(self) -> None:
        with contextlib.suppress(Exception):  # the rank that serves the store may have left before
            self.store.set_timeout(timedelta(seconds=1))
            self.store.set(f"left/{self.rank}", b"1")
