"""A dialogue in the terminal, or through pipes: lines in, text out as it comes."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator

from lockstep.cli.session import note


def is_person() -> bool:
    """Whether somebody sits there, rather than a program's pipes."""
    return sys.stdin.isatty() and sys.stdout.isatty()


def read_lines() -> Iterator[str]:
    """Each line, without its end, until there are no more. A person is prompted, and can edit."""
    if not is_person():
        while line := sys.stdin.readline():
            yield line.rstrip("\r\n")
        return
    import readline  # noqa: F401 - gives input() its line editing and history

    while True:
        try:
            line = input("> ")
        except EOFError:
            print()
            return
        yield line


def write_pieces(pieces: Iterable[str]) -> str:
    """Write text on standard output as it comes, and end the line; all of it. Ctrl-C ends the text, and no more.

    Raises as `pieces` do; what is said then stands on a line of its own.
    """
    text = ""
    try:
        for piece in pieces:
            text += piece
            sys.stdout.write(piece)
            sys.stdout.flush()
    except KeyboardInterrupt:
        note("\n(stopped)")
    except Exception:
        sys.stdout.write("\n" if text else "")
        sys.stdout.flush()
        raise
    sys.stdout.write("\n")
    sys.stdout.flush()
    return text
