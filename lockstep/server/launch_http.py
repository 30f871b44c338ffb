"""uvicorn, with bounds on what a connection may take before a request of it reaches the application: heads, waiting, sockets.

httptools, which parses, bounds nothing: a head without end would fill the memory, and a client that sends a byte a minute would
keep its socket for ever.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Generator
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any, ClassVar

import msgspec
import uvicorn
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from lockstep.config.serve import ServeOptions
from lockstep.observability import logging
from lockstep.server.errors import body_of

LAST_WORDS_S = 5  # for responses that have not ended when the server does


@dataclass(frozen=True)
class Limits:
    """Of one connection, and of how many there are."""

    head_bytes: int = 16384
    read_s: float = 60.0
    connections: int = 4096


class Server(uvicorn.Server):
    """uvicorn's, which leaves signals to its owner."""

    @contextlib.contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        yield


def make_server(app: Any, options: ServeOptions) -> Server:
    """The HTTP server of one process, to be run on sockets that are bound already."""
    limits = Limits(options.max_header_bytes, options.request_read_timeout, options.limit_concurrency)
    config = uvicorn.Config(
        app,
        http=bounded(limits),
        ws="none",
        lifespan="off",
        access_log=False,
        log_config=None,
        log_level=None,
        server_header=False,
        proxy_headers=False,  # whoever connects is who is counted, whatever its headers say
        timeout_keep_alive=options.keep_alive_timeout,  # type: ignore[arg-type]
        timeout_graceful_shutdown=LAST_WORDS_S,
        ssl_keyfile=options.ssl_keyfile,
        ssl_certfile=options.ssl_certfile,
        ssl_ca_certs=options.ssl_ca_certs,
        ssl_cert_reqs=options.ssl_cert_reqs,
    )
    logging.adopt("uvicorn", "error")  # each bad request is not worth a line that a stranger can cause
    return Server(config)


def bounded(limits: Limits) -> type[BoundedProtocol]:
    """The protocol with these limits."""
    return type("Bounded", (BoundedProtocol,), {"limits": limits})


class BoundedProtocol(HttpToolsProtocol):
    """One connection. What it waits for is a head (from its first moment, or its first byte after a response) or a body."""

    limits: ClassVar[Limits] = Limits()

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._timer: asyncio.TimerHandle | None = None
        self._in_head, self._refused = True, False
        self._fed, self._head_bytes = 0, 0  # bytes since the last head or body ended; of this head's lines
        if len(self.connections) > self.limits.connections:
            self._refuse(503, f"this server has {self.limits.connections} open connections already: try again in a moment.")
        else:
            self._wait()

    def connection_lost(self, exc: Exception | None) -> None:
        self._done_waiting()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self._refused or self.transport.is_closing():
            return
        self._fed += len(data)
        super().data_received(data)
        if self._in_head and self._fed and not self.transport.is_closing():
            if self._fed > self.limits.head_bytes:
                self._refuse_head()
            elif self._timer is None:
                self._wait()

    # --- what the parser finds ---

    def on_message_begin(self) -> None:
        self._head_bytes = 0
        super().on_message_begin()

    def on_url(self, url: bytes) -> None:
        self._head_bytes += len(url)
        super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        self._head_bytes += len(name) + len(value) + 4
        if self._head_bytes > self.limits.head_bytes and not self._in_head:
            self._refuse_head()  # trailers
        if not self._refused:
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        self._done_waiting()
        if self._head_bytes > self.limits.head_bytes:
            self._refuse_head()
            return
        self._in_head, self._fed = False, 0
        self._wait()
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        if not self._refused:
            super().on_body(body)

    def on_message_complete(self) -> None:
        self._done_waiting()
        self._in_head, self._fed = True, 0
        if not self._refused:
            super().on_message_complete()

    # --- waiting ---

    def _wait(self) -> None:
        self._timer = self.loop.call_later(self.limits.read_s, self._late)

    def _done_waiting(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _late(self) -> None:
        """What it waits for has not come. While a response is under way, or we do not read ourselves, that is no fault."""
        self._timer = None
        answering = self.cycle is not None and not self.cycle.response_complete
        if self.flow.read_paused or self.pipeline or (self._in_head and answering):
            self._wait()
        elif answering and self.cycle.response_started:
            self.transport.close()
        else:
            part = "head" if self._in_head else "body"
            self._refuse(408, f"the request's {part} did not come in {self.limits.read_s:g} s.")

    def _refuse_head(self) -> None:
        self._refuse(431, f"the request's head is longer than max_header_bytes={self.limits.head_bytes}.")

    def _refuse(self, status: int, message: str) -> None:
        """Answer without the application, and hang up."""
        if self._refused:
            return
        self._refused = True
        self._done_waiting()
        body = msgspec.json.encode(body_of(status, message))
        head = f"HTTP/1.1 {status} {HTTPStatus(status).phrase}\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n"
        retry = "retry-after: 1\r\n" if status == 503 else ""
        self.transport.write(f"{head}{retry}connection: close\r\n\r\n".encode() + body)
        self.transport.close()
