"""Responses that were stored: the last so many, in this process's memory."""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

from lockstep.server.errors import ApiError
from lockstep.server.schemas.chat import Message

MOST = 256
MOST_BYTES = 64 << 20


@dataclass
class Stored:
    """One of them. messages: what was asked and answered, for the response that goes on from it."""

    response: dict[str, Any]
    messages: list[Message]
    bytes: int
    task: asyncio.Task[None] | None = None  # of one that runs in the background


class ResponseStore:
    """Forgets the oldest when there are too many or too large ones; what still runs is ended then."""

    def __init__(self, most: int = MOST, most_bytes: int = MOST_BYTES) -> None:
        self._most, self._most_bytes = most, most_bytes
        self._bytes = 0
        self._found: OrderedDict[str, Stored] = OrderedDict()

    def put(self, stored: Stored) -> None:
        """Store it under its id, instead of what is there."""
        self.forget(stored.response["id"])
        self._found[stored.response["id"]] = stored
        self._bytes += stored.bytes
        while len(self._found) > self._most or (self._bytes > self._most_bytes and len(self._found) > 1):
            oldest = next(iter(self._found))
            task = self._found[oldest].task
            if task is not None:
                task.cancel()
            self.forget(oldest)

    def get(self, name: str, param: str = "id") -> Stored:
        """Raises ApiError 404 when there is none. param: where the client names it."""
        if name not in self._found:
            raise ApiError(
                404, f"response {name[:80]!r} is not stored here: only those made with store=true are, the last {self._most}.", param=param
            )
        return self._found[name]

    def forget(self, name: str) -> bool:
        """Whether there was one."""
        stored = self._found.pop(name, None)
        self._bytes -= stored.bytes if stored else 0
        return stored is not None

    def __contains__(self, name: str) -> bool:
        return name in self._found

    def __len__(self) -> int:
        return len(self._found)
