"""Requests in the order in which they are served."""

from __future__ import annotations

from bisect import bisect_left, insort
from operator import attrgetter

from lockstep.engine.request import Request

_KEY = attrgetter("key")


class RequestQueue:
    """Requests sorted by key (first served first). Keys are unique, so a request is found by bisection.

    `items` may be read and iterated by anyone; only the methods change it.
    """

    __slots__ = ("items",)

    def __init__(self) -> None:
        self.items: list[Request] = []

    def __len__(self) -> int:
        return len(self.items)

    def add(self, request: Request) -> None:
        """Put a request in its place. O(log n) comparisons."""
        if not self.items or self.items[-1].key < request.key:
            self.items.append(request)
        else:
            insort(self.items, request, key=_KEY)

    def remove(self, request: Request) -> None:
        """Take a request out. It must be here."""
        at = bisect_left(self.items, request.key, key=_KEY)
        assert self.items[at] is request, f"request {request.request_id!r} is not where its key says"
        del self.items[at]

    def pop(self, at: int = -1) -> Request:
        """Take out the request at this place; by default the last, which is the first to be preempted."""
        return self.items.pop(at)
