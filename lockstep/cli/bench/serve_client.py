"""A light HTTP/1.1 client that times streams: asyncio protocols, no library in between, a few microseconds per token.

Good for a thousand streams on one core. A time is taken where bytes arrive, before anything is parsed.
"""

from __future__ import annotations

import asyncio
import contextlib
import ssl
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, cast
from urllib.parse import urlsplit

import msgspec

from lockstep.cli.tls import certificate_problem

MAX_HEAD = 64 << 10  # bytes of a response's status line and headers
MAX_ERROR = 2000  # bytes kept of a refusal's body
CONNECT_S = 30.0


class LoadError(Exception):
    """A request that did not end well. kind: a word to count by."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind


@dataclass(slots=True)
class Record:
    """What became of one request. Times are of time.perf_counter, in seconds."""

    due_s: float = 0.0  # when it was to be sent
    sent_s: float = 0.0
    ended_s: float = 0.0
    times_s: list[float] = field(default_factory=list)  # when each piece of the output came
    input_tokens: int = 0  # as the server counted, 0 where it does not say
    output_tokens: int = 0  # as the server counted, else the number of pieces
    error_kind: str = ""
    error: str = ""


class Delta(msgspec.Struct):
    content: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None


class Choice(msgspec.Struct):
    text: str | None = None
    delta: Delta | None = None
    finish_reason: str | None = None


class Usage(msgspec.Struct):
    prompt_tokens: int = 0
    completion_tokens: int = 0


class Event(msgspec.Struct):
    """What a load generator reads of a stream's event."""

    choices: list[Choice] = []
    usage: Usage | None = None
    error: Any = None


decode_event = msgspec.json.Decoder(Event).decode


def brings_output(choice: Choice) -> bool:
    """Whether the event came because there was a token: not for a chat's opening role, nor for an end without text.

    A token may have no text (half a character), so a completion's event without text and without an end counts.
    """
    if choice.text is not None:
        return bool(choice.text) or choice.finish_reason is None
    delta = choice.delta
    return delta is not None and bool(delta.content or delta.reasoning_content or delta.reasoning)


class Connection(asyncio.Protocol):
    """One connection, one request at a time. `ask` writes it; every piece of the body goes to `on_body` with its time."""

    def __init__(self) -> None:
        self._transport: asyncio.Transport | None = None
        self.usable = True
        self._done: asyncio.Future[None] | None = None
        self._reset()

    def _reset(self) -> None:
        self._buffer = bytearray()
        self.status = 0
        self._left = -1  # bytes of the body (or chunk) that are still to come; -1: a chunk's length, or no end, comes next
        self._chunked = self._until_close = False
        self._trailer = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's is of no such class, though it is one

    async def ask(self, request: bytes, on_body: Callable[[bytes, float], None]) -> None:
        """Until the response has ended. Raises LoadError when the connection ends before it."""
        assert self._transport is not None
        self._reset()
        self._on_body = on_body
        self._done = asyncio.get_running_loop().create_future()
        self._transport.write(request)
        await self._done

    def close(self) -> None:
        self.usable = False
        if self._transport is not None:
            self._transport.abort()

    def data_received(self, data: bytes) -> None:
        now_s = time.perf_counter()
        if self._done is None or self._done.done():
            self.close()  # it speaks out of turn
            return
        try:
            self._take(data, now_s)
        except (LoadError, ValueError, msgspec.DecodeError) as e:
            self._fail(e if isinstance(e, LoadError) else LoadError("protocol", f"the server's answer cannot be read: {e}"))

    def connection_lost(self, exc: Exception | None) -> None:
        self.usable = False
        if self._done is None or self._done.done():
            return
        if self._until_close and exc is None:
            self._done.set_result(None)
        else:
            self._fail(LoadError("disconnected", f"the server hung up before the answer's end{f': {exc}' if exc else ''}."))

    def _fail(self, error: LoadError) -> None:
        self.usable = False
        if self._done is not None and not self._done.done():
            self._done.set_exception(error)
        if self._transport is not None:
            self._transport.abort()

    def _take(self, data: bytes, now_s: float) -> None:
        if not self.status:
            self._buffer += data
            if not self._head():
                return
            data = bytes(self._buffer)
            self._buffer.clear()
        if self._chunked:
            self._chunks(data, now_s)
        elif self._until_close:
            self._on_body(data, now_s)
        else:
            self._left -= len(data)
            if data:
                self._on_body(data, now_s)
            if self._left <= 0:
                self._finish()

    def _head(self) -> bool:
        """Whether the headers are complete; they are then read and taken off the buffer."""
        end = self._buffer.find(b"\r\n\r\n")
        if end < 0:
            if len(self._buffer) > MAX_HEAD:
                raise LoadError("protocol", "the server's headers do not end.")
            return False
        first, *lines = bytes(self._buffer[:end]).split(b"\r\n")
        del self._buffer[: end + 4]
        self.status = int(first.split(b" ", 2)[1])
        headers = {name.strip().lower(): value.strip().lower() for name, _, value in (line.partition(b":") for line in lines)}
        self.usable = headers.get(b"connection") != b"close"
        self._chunked = headers.get(b"transfer-encoding") == b"chunked"
        if not self._chunked:
            self._until_close = b"content-length" not in headers
            self._left = int(headers.get(b"content-length", b"-1"))
        return True

    def _chunks(self, data: bytes, now_s: float) -> None:
        """Hand out what the chunks carry; keep what is no whole chunk yet."""
        if self._buffer:
            data = bytes(self._buffer) + data
            self._buffer.clear()
        at = 0
        while True:
            line = data.find(b"\r\n", at)
            if line < 0:
                break
            size = int(data[at:line].split(b";", 1)[0], 16)
            start, end = line + 2, line + 2 + size
            if len(data) < end + 2:
                break
            if size == 0:
                self._finish()
                return
            self._on_body(data[start:end], now_s)
            at = end + 2
        self._buffer += data[at:]

    def _finish(self) -> None:
        if self._done is not None and not self._done.done():
            self._done.set_result(None)


class Client:
    """Sends requests to one server over connections that are kept and reused."""

    def __init__(self, base_url: str, headers: Mapping[str, str], timeout_s: float, tls: ssl.SSLContext | None = None) -> None:
        """tls: for an https address; None checks its certificate by the system's authorities.

        Raises ValueError for an address that is none.
        """
        parts = urlsplit(base_url.rstrip("/"))
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(f"--base-url={base_url} is no address: write it like http://127.0.0.1:8000.")
        self._host, self._tls = parts.hostname, (tls or ssl.create_default_context()) if parts.scheme == "https" else None
        self._port = parts.port or (443 if self._tls else 80)
        self._path = parts.path.removesuffix("/v1")
        base = {"Host": parts.netloc.rpartition("@")[2], "Content-Type": "application/json", "Accept": "*/*", **headers}
        self._headers = "".join(f"{name}: {value}\r\n" for name, value in base.items())
        self._timeout_s = timeout_s
        self._free: list[Connection] = []

    async def get(self, path: str) -> Any:
        """The decoded JSON of a GET. Raises LoadError."""
        pieces: list[bytes] = []
        connection = await self._roundtrip(self._request("GET", path, b""), lambda data, _: pieces.append(data))
        self._put_back(connection)
        body = b"".join(pieces)
        if connection.status != 200:
            raise refusal(connection.status, body)
        return msgspec.json.decode(body)

    async def stream(self, path: str, body: dict[str, Any], record: Record) -> None:
        """Send one streaming request and fill `record`; never raises but when cancelled."""
        sink = _Sink(record)
        request = self._request("POST", path, msgspec.json.encode(body))
        record.sent_s = time.perf_counter()
        try:
            async with asyncio.timeout(self._timeout_s):
                connection = await self._roundtrip(request, sink.feed)
            if connection.status != 200:
                raise refusal(connection.status, sink.rest)
            self._put_back(connection)
            sink.check()
        except TimeoutError:
            record.error_kind, record.error = "timeout", f"no end after {self._timeout_s:g} s."
        except LoadError as e:
            record.error_kind, record.error = e.kind, str(e)
        record.ended_s = time.perf_counter()
        record.output_tokens = record.output_tokens or len(record.times_s)

    def close(self) -> None:
        """Close the connections that nobody uses."""
        while self._free:
            self._free.pop().close()

    def _request(self, method: str, path: str, body: bytes) -> bytes:
        return f"{method} {self._path}{path} HTTP/1.1\r\n{self._headers}Content-Length: {len(body)}\r\n\r\n".encode() + body

    def _put_back(self, connection: Connection) -> None:
        if connection.usable:
            self._free.append(connection)

    async def _roundtrip(self, request: bytes, on_body: Callable[[bytes, float], None]) -> Connection:
        """The connection on which the response has ended. A kept one that the server had closed meanwhile is replaced, once."""
        while self._free:
            connection = self._free.pop()
            if not connection.usable:
                continue
            try:
                return await self._ask(connection, request, on_body)
            except LoadError as e:
                if e.kind != "disconnected" or connection.status:
                    raise
                break
        try:
            made = asyncio.get_running_loop().create_connection(
                Connection, self._host, self._port, ssl=self._tls, server_hostname=self._host if self._tls else None
            )
            _, connection = await asyncio.wait_for(made, CONNECT_S)
        except (OSError, TimeoutError) as e:
            if problem := certificate_problem(e):
                raise LoadError("connect", f"{self._host}:{self._port}: {problem}") from None
            raise LoadError("connect", f"{self._host}:{self._port} cannot be reached: {e or 'no answer'}.") from None
        return await self._ask(connection, request, on_body)

    async def _ask(self, connection: Connection, request: bytes, on_body: Callable[[bytes, float], None]) -> Connection:
        try:
            await connection.ask(request, on_body)
        except BaseException:
            connection.close()
            raise
        return connection


def refusal(status: int, body: bytes) -> LoadError:
    """The error of a response that is not 200."""
    text = body[:MAX_ERROR].decode(errors="replace")
    with contextlib.suppress(msgspec.DecodeError, KeyError, TypeError):
        text = msgspec.json.decode(body)["error"]["message"]
    return LoadError(f"http_{status}", text or f"the server answered {status}.")


class _Sink:
    """Reads a stream of events into a record. `rest` is what was no event: a refusal's body."""

    def __init__(self, record: Record) -> None:
        self._record = record
        self.rest = b""
        self._done = False

    def feed(self, data: bytes, now_s: float) -> None:
        """Take a piece of the body."""
        if self.rest:
            data = self.rest + data
        *events, self.rest = data.replace(b"\r\n", b"\n").split(b"\n\n") if b"\r\n" in data else data.split(b"\n\n")
        for event in events:
            if event.startswith(b"data:"):
                self._event(event[5:].strip(), now_s)

    def _event(self, data: bytes, now_s: float) -> None:
        if data == b"[DONE]":
            self._done = True
            return
        event = decode_event(data)
        if event.error is not None:
            raise LoadError("stream_error", str(event.error)[:MAX_ERROR])
        if event.choices and brings_output(event.choices[0]):
            self._record.times_s.append(now_s)
        if event.usage is not None:
            self._record.input_tokens = event.usage.prompt_tokens
            self._record.output_tokens = event.usage.completion_tokens

    def check(self) -> None:
        """Raises LoadError when the stream ended without saying so, or brought nothing."""
        if not self._done:
            raise LoadError("disconnected", "the stream ended without [DONE].")
        if not self._record.times_s:
            raise LoadError("empty", "the answer brought no token.")
