"""A dialogue in the terminal, or through pipes: lines in, text out as it comes."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from io import TextIOWrapper
from typing import NamedTuple

from lockstep.cli.errors import UsageError
from lockstep.cli.session import note


def is_person() -> bool:
    """Whether somebody sits there, rather than a program's pipes."""
    return sys.stdin.isatty() and sys.stdout.isatty()


def read_lines() -> Iterator[str]:
    """Each line, without its end, until there are no more. A person is prompted, and can edit.

    Raises UsageError for a line through a pipe that is no UTF-8.
    """
    if not is_person():
        if isinstance(sys.stdin, TextIOWrapper):
            sys.stdin.reconfigure(encoding="utf-8", errors="surrogateescape")  # so that the line is known that has other bytes
        for number, line in enumerate(iter(sys.stdin.readline, ""), 1):
            yield text_of(line.rstrip("\r\n"), f"line {number}")
        return
    import readline  # noqa: F401 - gives input() its line editing and history

    while True:
        try:
            line = input("> ")
        except EOFError:
            print()
            return
        yield line


def text_of(given: str, what: str) -> str:
    """The same. Raises UsageError for what came in as bytes that are no UTF-8."""
    try:
        given.encode()
    except UnicodeEncodeError:
        raise UsageError(f"{what} is no UTF-8: convert it, with iconv for instance.") from None
    return given


class Written(NamedTuple):
    """The text that was written, and whether Ctrl-C ended it."""

    text: str
    stopped: bool


def write_pieces(pieces: Iterable[str]) -> Written:
    """Write text on standard output as it comes, and end the line. Ctrl-C ends the text, and no more.

    Raises as `pieces` do; what is said then stands on a line of its own.
    """
    text, stopped = "", False
    try:
        for piece in pieces:
            text += piece
            sys.stdout.write(piece)
            sys.stdout.flush()
    except KeyboardInterrupt:
        note("\n(stopped)")
        stopped = True
    except Exception:
        sys.stdout.write("\n" if text else "")
        sys.stdout.flush()
        raise
    sys.stdout.write("\n")
    sys.stdout.flush()
    return Written(text, stopped)
