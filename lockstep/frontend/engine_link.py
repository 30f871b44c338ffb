"""An API process's connection to the engine's process: whichever that is at the moment."""

from __future__ import annotations

import asyncio
import contextlib

import zmq
import zmq.asyncio

from lockstep.frontend import engine_wire as wire
from lockstep.frontend.streams import EngineDeadError

HELLO_S = 5.0  # how long a greeting may be unanswered before it is said again
MOST_AT_ONCE = 64  # messages taken together
GOODBYE_MS = 200  # for the last message to leave this process; an engine that is gone does not take it


class EngineLink:
    """Sends orders, receives replies; `greet` before either. For one event loop."""

    def __init__(self, endpoint: str, secret: str, index: int) -> None:
        """index: of this API process among all."""
        self._endpoint, self._secret, self._index = endpoint, secret, index
        self.linked = False  # whether an engine has welcomed us
        self._context: zmq.asyncio.Context = zmq.asyncio.Context()
        self._socket = self._new_socket()

    def _new_socket(self) -> zmq.asyncio.Socket:
        socket = self._context.socket(zmq.DEALER)
        socket.setsockopt(zmq.IDENTITY, f"api-{self._index}".encode())
        socket.setsockopt(zmq.MAXMSGSIZE, wire.MAX_BYTES)
        socket.setsockopt(zmq.SNDHWM, 0)
        socket.setsockopt(zmq.RCVHWM, 0)
        socket.setsockopt(zmq.LINGER, 0)
        socket.connect(self._endpoint)
        return socket

    async def greet(self, timeout_s: float) -> wire.Welcome:
        """Prove the secret, until the engine answers. It may still be loading, or be another one by now: said again now and then.

        Raises EngineDeadError when nobody answers in time.
        """
        try:
            async with asyncio.timeout(timeout_s):
                while True:
                    with contextlib.suppress(TimeoutError):
                        async with asyncio.timeout(min(HELLO_S, timeout_s)):
                            welcome = await self._greet()
                            self.linked = True
                            return welcome
        except TimeoutError:
            raise EngineDeadError(f"the engine did not answer in {timeout_s:g} s.", kind="hung") from None

    async def _greet(self) -> wire.Welcome:
        mine = wire.nonce()
        await self._socket.send(wire.encode(wire.Hello(mine)))
        while True:
            reply = wire.decode_reply(await self._socket.recv())
            if isinstance(reply, wire.Challenge):
                if wire.engine_proof(self._secret, mine, reply.nonce) == reply.proof:  # else of an earlier Hello, or not the engine's
                    await self._socket.send(wire.encode(wire.Proof(wire.api_proof(self._secret, mine, reply.nonce))))
            elif isinstance(reply, wire.Welcome):
                return reply

    async def send(self, order: wire.Order) -> None:
        """Nothing is sent between two engines: the next one is told all that there is."""
        if self.linked:
            await self._socket.send(wire.encode(order))

    async def receive(self) -> list[wire.Reply]:
        """Everything that has come, at least one: who is behind takes the tokens of several steps at once, and catches up.

        Raises one of `NO_MESSAGE` for what is none.
        """
        frames = [await self._socket.recv()]
        with contextlib.suppress(zmq.Again):
            while len(frames) < MOST_AT_ONCE:
                frames.append(await self._socket.recv(zmq.NOBLOCK))
        return [wire.decode_reply(frame) for frame in frames]

    def renew(self) -> None:
        """The engine's process is gone: forget what it still said, and wait for the next."""
        self._socket.close()
        self._socket = self._new_socket()

    async def close(self) -> None:
        """Hang up; an engine that has welcomed us is told."""
        linger_ms = 0
        if self.linked:
            self.linked, linger_ms = False, GOODBYE_MS
            with contextlib.suppress(TimeoutError):  # nobody takes messages any more
                await asyncio.wait_for(self._socket.send(wire.encode(wire.Goodbye())), GOODBYE_MS / 1e3)
        self._socket.close(linger_ms)
        self._context.term()
