"""What the port answers before the server does: that it starts. On a thread of its own, from the moment that the port listens.

/livez                                  200
/health, /ready, /readyz, /startupz     503, "starting", and what it is at
anything else                           503 with Retry-After, an error as any other

It lets go of the port before the server takes it: who comes between the two waits in the system's queue. Of several API processes the
first takes it at once, and this lets go in the next turn of the process that started them: for that moment either may answer, one that
the server starts, the other as the server. Whoever it has let in before is answered still, and no connection is kept for a second request.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading
import time
from typing import Any

import uvloop
from starlette._utils import get_route_path
from starlette.responses import JSONResponse
from starlette.types import Receive, Scope, Send

from lockstep.config.serve import ServeOptions
from lockstep.observability.logging import get_logger
from lockstep.server.errors import ApiError, respond
from lockstep.server.launch_http import make_server
from lockstep.server.middleware import RequestLog
from lockstep.server.routes.health import NAMES

AGAIN_S = 1
LET_GO_S = 2.0  # for a thread that has little to do
POLL_S = 0.02
UNREADY = frozenset({"/health", "/ready", "/readyz", "/startupz"})
_log = get_logger(__name__)


class Starting:
    """The application until there is one."""

    def __init__(self, options: ServeOptions) -> None:
        self.at = "the engine loads"  # what the start is at
        self._options, self._since_s = options, time.monotonic()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        while (await receive()).get("more_body"):  # hanging up on what was not read would cost the answer
            pass
        await self._answer(get_route_path({**scope, "root_path": self._options.root_path}))(scope, receive, send)

    def _answer(self, path: str) -> JSONResponse:
        headers = {"connection": "close"}
        if path == "/livez":
            return JSONResponse({"status": "alive"}, headers=headers)
        headers["retry-after"] = str(AGAIN_S)
        if path in UNREADY:
            return JSONResponse({"status": "starting", "problems": [self._problem()]}, 503, headers)
        return respond(ApiError(503, f"the server is starting: {self.at}. Ask again in a moment.", code="starting", headers=headers))

    def _problem(self) -> dict[str, Any]:
        for_s = round(time.monotonic() - self._since_s, 2)
        problem = {"process": "server", "state": "starting", "for_s": for_s, "why": self.at}
        return {name: problem[name] for name in NAMES if name in problem} if self._options.api_key else problem


class Porch:
    """`Starting` on the listener, until `let_go`. `close` however it ends."""

    def __init__(self, options: ServeOptions, listener: socket.socket) -> None:
        """Answers from now on, or a moment later. The listener stays its owner's."""
        self.app = Starting(options)
        self._server = make_server(RequestLog(self.app), options)
        self._socket, self._patience_s = listener.dup(), options.request_read_timeout
        self._loop, self._leave, self._left = uvloop.new_event_loop(), asyncio.Event(), threading.Event()
        self._thread = threading.Thread(target=self._run, name="starting", daemon=True)
        self._thread.start()

    def let_go(self) -> None:
        """Take no more connections from here on. Does not wait for the answers to those that were taken. May be called twice."""
        with contextlib.suppress(RuntimeError):  # the loop is closed: long done
            self._loop.call_soon_threadsafe(self._leave.set)
        if not self._left.wait(LET_GO_S):
            _log.warning("the thread that answers during the start holds the port for more than %g s", LET_GO_S)

    def close(self) -> None:
        """Be done, also with those that have not said what they want."""
        self._patience_s = 0.0
        self.let_go()
        self._thread.join(LET_GO_S)

    def _run(self) -> None:
        try:
            with asyncio.Runner(loop_factory=lambda: self._loop) as runner:
                runner.run(self._serve())
        except Exception:  # the server itself meets the same, and says it where it is heard
            _log.warning("nothing is answered during the start", exc_info=True)
        finally:
            self._socket.close()
            self._left.set()

    async def _serve(self) -> None:
        serving = asyncio.create_task(self._server.serve(sockets=[self._socket]))
        leave = asyncio.create_task(self._leave.wait())
        await asyncio.wait([serving, leave], return_when=asyncio.FIRST_COMPLETED)
        while not self._server.started and not serving.done():
            await asyncio.sleep(POLL_S)
        for one in self._server.servers if self._server.started else ():
            one.close()
        self._left.set()
        since_s = time.monotonic()
        while self._server.server_state.connections and time.monotonic() - since_s < self._patience_s:
            await asyncio.sleep(POLL_S)
        self._server.should_exit = True
        leave.cancel()
        await serving
