"""JSON bodies within bounds of their own: counted before they are read, at the speed of `bytes.count`, for a parser holds up every
other request of its process while it reads.

What a later stage would trip over is refused here too: nesting that exhausts a stack, bytes that are no UTF-8, halves of surrogate
pairs, NaN, numbers beyond all ranges.
"""

from __future__ import annotations

import re
from itertools import accumulate
from typing import Any

import msgspec

from lockstep.server.errors import TOO_LONG, ApiError
from lockstep.server.schemas.common import INT64, MAX_IDS

MAX_DEPTH = 64  # arrays and objects in each other
MAX_CONTAINERS = 100_000  # arrays and objects in a body
MAX_VALUES = MAX_IDS  # of all arrays and objects together: a prompt of token ids is the longest that can be served
MAX_STRINGS = 1 << 18  # names included
MAX_NAMES = 1 << 16  # of objects: each takes as long to read as 30 token ids
PIECE = 256 << 10  # bytes that are looked at in one go
LONG_NUMBER = b"0" * 19  # the first that 64 bits may not hold
_DIGITS = bytes.maketrans(b"123456789", b"0" * 9)
_NO_BRACKET = bytes(set(range(256)) - set(b"[]{}"))
_ONE_PROMPT = re.compile(rb'"(prompt|input|input_ids|tokens)"\s*:\s*\[\s*-?\d')
_HALF = re.compile(rb"\\u[dD][89abAB][0-9a-fA-F]{2}(?!\\u[dD][c-fC-F])|(?<!\\u[dD][89abAB][0-9a-fA-F]{2})\\u[dD][c-fC-F]")
_WHERE = re.compile(r"\(byte (\d+)\)")
_decode = msgspec.json.Decoder().decode


def parse(body: bytes) -> Any:
    """The value of a JSON body. Raises ApiError 400 for what is none, nested too deeply, or of too many values."""
    counts = Counts()
    counts.read(body)
    try:
        value = _decode(body)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as e:
        half = "the body's text has half of a surrogate pair (like \\ud83d alone), which is no character: send the whole pair, or UTF-8."
        message = half if _half_near(body, str(e)) else f"the body is no valid JSON in UTF-8: {e}."
        raise ApiError(400, message, code="invalid_json") from None
    if counts.long_number:
        check_whole_numbers(value)
    return value


class Counts:
    """What is outside of a body's strings, counted. Whether it is JSON at all is not looked at."""

    def __init__(self) -> None:
        self.containers = self.values = self.names = self.quotes = 0
        self.depth = 0
        self.long_number = False  # there is one that 64 bits may not hold
        self._end = b""  # of what was read, where a number may go on

    def read(self, body: bytes) -> None:
        """Count, in pieces: no call takes long enough to be noticed beside it. Raises ApiError 400 for the first bound that is broken."""
        at = 0
        while at < len(body):
            end = at + PIECE
            piece = body[at:end]
            if (len(piece) - len(piece.rstrip(b"\\"))) % 2:  # the other half of an escape comes along
                piece, end = piece + body[end : end + 1], end + 1
            self._add(piece)
            self._check(body)
            at = end

    def _add(self, piece: bytes) -> None:
        if b"\\" in piece:
            piece = piece.replace(b"\\\\", b"").replace(b'\\"', b"")
        parts = piece.split(b'"')
        outside = b"".join(parts[self.quotes % 2 :: 2])
        self.quotes += len(parts) - 1
        self.values += outside.count(b",")
        self.names += outside.count(b":")
        self.containers += outside.count(b"[") + outside.count(b"{")
        brackets = outside.translate(None, _NO_BRACKET)
        if self.containers <= MAX_CONTAINERS and self.depth >= 0 and brackets:  # below 0 it is no JSON, which the parser says
            self.depth = self._after(brackets)
        outside = self._end + outside
        self.long_number = self.long_number or LONG_NUMBER in outside.translate(_DIGITS)
        self._end = outside[-len(LONG_NUMBER) :]

    def _after(self, brackets: bytes) -> int:
        """The depth behind these."""
        found = list(accumulate((1 if one in b"[{" else -1 for one in brackets), initial=self.depth))
        if max(found) > MAX_DEPTH:
            raise ApiError(400, f"the body's JSON is nested more than {MAX_DEPTH} deep: make it flatter.", code="json_too_deep")
        return found[-1]

    def _check(self, body: bytes) -> None:
        first = body.find(b"[")
        if self.values >= MAX_VALUES and self.containers == 2 and (found := _ONE_PROMPT.search(body, max(0, first - 64), first + 64)):
            name = found[1].decode()
            message = f"{name}: it has more than {MAX_VALUES} token ids, which no context holds: shorten it."
            raise ApiError(400, message, param=name, code=TOO_LONG)
        bounds = {
            "arrays and objects": (self.containers, MAX_CONTAINERS),
            "values": (self.values, MAX_VALUES),
            "fields": (self.names, MAX_NAMES),
            "strings": (self.quotes // 2, MAX_STRINGS),
        }
        for what, (count, most) in bounds.items():
            if count > most:
                raise ApiError(400, f"the body's JSON has more than {most} {what}: send less at once.", code="json_too_large")


def check_whole_numbers(value: Any, path: str = "") -> None:
    """Raise ApiError 400 for a whole number that 64 bits cannot hold: it would pass every check that only looks for a number."""
    if isinstance(value, dict):
        for name, one in value.items():
            check_whole_numbers(one, path or name)
    elif isinstance(value, list):
        for one in value:
            check_whole_numbers(one, path)
    elif isinstance(value, int) and not -INT64 <= value < INT64:
        what = f"{path[:64]}: " if path else ""
        digits = str(value)
        digits = digits if len(digits) <= 24 else f"{digits[:24]}..."
        raise ApiError(400, f"{what}the whole number {digits} is out of range: 64 bits are for it.", param=path[:64] or None)


def _half_near(body: bytes, error: str) -> bool:
    """Whether the parser stopped at half of a surrogate pair."""
    where = _WHERE.search(error)
    at = int(where[1]) if where else len(body)  # it says no place where it needed more bytes
    return bool(_HALF.search(body, max(0, at - 16), at + 16))
