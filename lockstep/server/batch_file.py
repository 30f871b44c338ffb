"""The files of `lockstep run-batch`, in the form of OpenAI's Batch API: a request a line in, an answer a line out.

    {"custom_id": "a", "method": "POST", "url": "/v1/completions", "body": {"prompt": "def f("}}
    {"id": "batch_req_...", "custom_id": "a", "response": {"status_code": 200, "request_id": "...", "body": {...}}, "error": null}

Files of this machine only: whoever gives a name of a file shall not thereby have a request sent somewhere.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import shutil
import stat
import sys
import tempfile
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import msgspec

from lockstep.config.errors import ConfigError

URLS = ("/v1/chat/completions", "/v1/completions", "/v1/embeddings")
PIPE = "-"  # in the place of a file's name: standard input or output


class Ask(msgspec.Struct, frozen=True):
    """One line: a request, whose body is left for its route to read."""

    custom_id: str
    method: str
    url: str
    body: msgspec.Raw


class LineError(msgspec.Struct, frozen=True):
    """Why a line is no request. code: a word that programs can compare."""

    code: str
    message: str


class Refused(msgspec.Struct, frozen=True):
    """A line that is no request."""

    custom_id: str | None
    error: LineError


class Response(msgspec.Struct, frozen=True):
    """What the route answered, errors included."""

    status_code: int
    request_id: str
    body: msgspec.Raw


class Result(msgspec.Struct, frozen=True):
    """One line of the output. Either `response` or `error` is None."""

    id: str
    custom_id: str | None
    response: Response | None
    error: LineError | None

    @property
    def wrong(self) -> bool:
        return self.response is None or self.response.status_code != 200


class _Named(msgspec.Struct):
    custom_id: Any = None


class _Streamed(msgspec.Struct):
    stream: Any = None


def result_of(asked: Ask | Refused, response: Response | None = None) -> Result:
    """The line that answers `asked`."""
    error = asked.error if isinstance(asked, Refused) else None
    return Result(f"batch_req_{uuid.uuid4().hex}", asked.custom_id, response, error)


def read_line(number: int, line: bytes) -> Ask | Refused:
    """The request of a line; its body is whatever it is. number: of the line, from 1 on."""
    try:
        found = msgspec.json.decode(line, type=Ask)
    except msgspec.ValidationError as e:
        return _refused(number, line, "invalid_line", str(e))
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as e:
        return _refused(number, line, "invalid_json", f"no valid JSON in UTF-8: {e}")
    if found.method != "POST":
        return _refused(number, line, "invalid_method", f"method is {found.method[:40]!r}: it must be POST")
    if found.url not in URLS:
        return _refused(number, line, "invalid_url", f"url is {found.url[:80]!r}: it must be one of {', '.join(URLS)}")
    if _streams(found.body):
        return _refused(number, line, "stream_unsupported", "the body has `stream`: answers of a batch come whole, so leave it out")
    return found


def _refused(number: int, line: bytes, code: str, why: str) -> Refused:
    return Refused(_name(line), LineError(code, f"line {number}: {why}."))


def _name(line: bytes) -> str | None:
    with contextlib.suppress(msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        found = msgspec.json.decode(line, type=_Named).custom_id
        return found if isinstance(found, str) else None
    return None


def _streams(body: msgspec.Raw) -> bool:
    with contextlib.suppress(msgspec.MsgspecError, UnicodeDecodeError, RecursionError):  # the route says what is wrong with it
        return msgspec.json.decode(body, type=_Streamed).stream not in (None, False)
    return False


class BatchInput:
    """The lines of a batch, looked through once before anything runs: `count` of them, empty ones left out. A context manager."""

    def __init__(self, name: str) -> None:
        """name: of a local file, or -. Raises ConfigError where it cannot be read, has no line, or two with one custom_id."""
        self._name = name
        self._file = _opened(name)
        try:
            self.count = self._look_through()
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> BatchInput:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def lines(self) -> Iterator[Ask | Refused]:
        """Each line, in the file's order."""
        for number, line in self._numbered():
            yield read_line(number, line)

    def _numbered(self) -> Iterator[tuple[int, bytes]]:
        self._file.seek(0)
        return ((number, line) for number, line in enumerate(self._file, 1) if line.strip())

    def _look_through(self) -> int:
        first: dict[str, int] = {}
        count = 0
        for number, line in self._numbered():
            count += 1
            name = _name(line)
            if name is not None and first.setdefault(name, number) != number:
                raise ConfigError(
                    f"input_file={self._name!r}: lines {first[name]} and {number} have the same custom_id {name[:80]!r}, and their answers "
                    "could not be told apart: give each a name of its own."
                )
        if not count:
            raise ConfigError(f"input_file={self._name!r} has no line: write one request on each.")
        return count


def _opened(name: str) -> IO[bytes]:
    """The file, to be read more than once: what comes through a pipe is kept for that."""
    if "://" in name:
        raise ConfigError(f"input_file={name!r} is an address: only files of this machine are read; fetch it first, or pipe it in (-).")
    try:
        found: IO[bytes] = sys.stdin.buffer if name == PIPE else open(name, "rb")  # noqa: SIM115 - its owner closes it
        if name != PIPE and found.seekable():
            return found
        kept = tempfile.TemporaryFile()  # noqa: SIM115 - its owner closes it
        shutil.copyfileobj(found, kept)
        return kept
    except OSError as e:
        raise ConfigError(f"input_file={name!r} cannot be read: {e.strerror or e}: give a file of requests, one a line.") from None


class BatchOutput:
    """Where the answers go: beside the file, to FILE.part, which becomes the file when all are there. A context manager.

    Left before `finish`, what is done stays in the part file. A pipe or a device is written as it is.
    """

    def __init__(self, name: str) -> None:
        """Raises ConfigError where it cannot be written, another run writes it, or the part file has what one had done."""
        self._name, self._path = name, Path(name)
        self._part: Path | None = None
        self._file: IO[bytes]
        if "://" in name:
            raise ConfigError(f"output_file={name!r} is an address: only files of this machine are written.")
        try:
            if name == PIPE:
                self._file = sys.stdout.buffer
            elif self._path.exists() and not self._path.is_file():
                self._file = open(self._path, "wb")  # noqa: SIM115 - closed at the end
            else:
                self._open_part()
        except OSError as e:
            raise self._unwritable(e) from None

    def _open_part(self) -> None:
        """At the start, so that of two runs to one file the second ends before it has loaded anything."""
        self._path = self._path.resolve()
        self._part = self._path.with_name(f"{self._path.name}.part")
        self._file = _held(self._part)

    def __enter__(self) -> BatchOutput:
        return self

    def __exit__(self, *_: object) -> None:
        if self._name == PIPE:
            return
        with contextlib.suppress(OSError):  # what could not be written has been told
            if self._part is not None and not self._file.closed and _is_at(self._file, self._part) and not _size(self._file):
                self._part.unlink()  # nobody needs it; still held: nobody has taken it over
            self._file.close()

    @property
    def where(self) -> str:
        """Where it is now what has been written."""
        return "standard output" if self._name == PIPE else str(self._part or self._path)

    def write(self, result: Result) -> None:
        """Add a line; it is out of this process then. Raises ConfigError, and BrokenPipeError where the reader has gone."""
        try:
            self._file.write(msgspec.json.encode(result) + b"\n")
            self._file.flush()
        except BrokenPipeError:
            raise
        except OSError as e:
            raise self._unwritable(e) from None

    def finish(self) -> None:
        """All lines are there. Raises ConfigError."""
        if self._part is None:
            return
        try:
            os.fsync(self._file.fileno())  # some file systems say only now that there is no room
            self._part.replace(self._path)  # while it is held: whoever comes next finds none, and makes its own
            self._part = None
            self._file.close()
        except OSError as e:
            raise self._unwritable(e) from None

    def _unwritable(self, error: OSError) -> ConfigError:
        if isinstance(error, _HeldError):
            return ConfigError(
                f"output_file={self._name!r}: another run writes it now, to {self._part}: give another one, or wait for that."
            )
        if isinstance(error, _UnlockedError):
            return ConfigError(
                f"output_file={self._name!r}: {self._part} is there, and its file system has no locks to tell whether another run writes "
                "it: remove it if none does, or give another one."
            )
        if error.errno == errno.ELOOP and self._part is not None and self._part.is_symlink():
            return ConfigError(f"output_file={self._name!r}: {self._part} is a symbolic link, which is not followed: remove it.")
        if isinstance(error, FileExistsError):
            return ConfigError(
                f"output_file={self._name!r}: {self._part} is there, with what a run had done that ended early: move it away, or remove it."
            )
        return ConfigError(f"output_file={self._name!r} cannot be written: {error.strerror or error}: give another one, or make room.")


class _HeldError(OSError):
    """Another process has the file."""


class _UnlockedError(OSError):
    """Nobody can tell whether another process has the file."""


def _held(path: Path) -> IO[bytes]:
    """The file, made here or found empty as a killed run leaves it, and locked: the lock ends with this process, however that ends.

    Raises FileExistsError where something is in it, _HeldError where another process has it, _UnlockedError where none can say so.
    """
    while True:
        made, file = _opened_to_write(path)
        if file is None:
            continue
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as e:
            if isinstance(e, BlockingIOError) or not made:  # else a file system without locks: it is whose who made it
                file.close()
                raise (_HeldError if isinstance(e, BlockingIOError) else _UnlockedError) from None
        if not _is_at(file, path):  # whose it was has just ended, and moved it
            file.close()
        elif _size(file) or not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            file.close()
            raise FileExistsError
        else:
            return file


def _opened_to_write(path: Path) -> tuple[bool, IO[bytes] | None]:
    """(whether it was made here, the file); None where it was there, and is gone. Raises OSError for a link, wherever that leads."""
    try:
        return True, open(path, "xb")
    except FileExistsError:
        with contextlib.suppress(FileNotFoundError):
            return False, os.fdopen(os.open(path, os.O_WRONLY | os.O_NOFOLLOW | os.O_NONBLOCK), "wb")
    return False, None


def _is_at(file: IO[bytes], path: Path) -> bool:
    """Whether the open file is the one that the path names now."""
    with contextlib.suppress(FileNotFoundError):
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    return False


def _size(file: IO[bytes]) -> int:
    return os.fstat(file.fileno()).st_size
