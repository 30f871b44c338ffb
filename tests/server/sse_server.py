"""The least server that streams tokens: raw asyncio, scripted by the prompt. For what tests of the load generator need to know."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


class SseServer:
    """`asked`: the bodies that came; `most`: the most streams at once; `connections`: how many were made.

    A text prompt is an instruction: "refuse" (429), "break", "event-error", "empty", "hang"; anything else streams
    `max_tokens` tokens, `gap_s` apart.
    """

    def __init__(self, gap_s: float = 0.0, hold: int = 0) -> None:
        """hold: no stream ends before so many have begun."""
        self.gap_s, self.hold = gap_s, hold
        self.asked: list[dict[str, Any]] = []
        self.headers: list[str] = []
        self.now = self.most = self.begun = self.connections = 0
        self.url = ""

    async def handle(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        try:
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode()
                size = next((int(line.split(":")[1]) for line in head.split("\r\n") if line.lower().startswith("content-length")), 0)
                body = await reader.readexactly(size)
                self.headers.append(head)
                if not await self._answer(head.split(" ")[1], json.loads(body or b"{}"), writer):
                    return
        except (asyncio.IncompleteReadError, ConnectionError, asyncio.CancelledError):  # the last: the test is over
            pass
        finally:
            writer.close()

    async def _answer(self, path: str, body: dict[str, Any], writer: asyncio.StreamWriter) -> bool:
        """Whether the connection goes on."""
        if path == "/v1/models":
            self._whole(writer, 200, {"data": [{"id": "fake"}]})
            return True
        self.asked.append(body)
        word = body["prompt"] if isinstance(body.get("prompt"), str) else ""
        if word == "refuse":
            self._whole(writer, 429, {"error": {"message": "the queue is full."}})
            return True
        self.now += 1
        self.begun += 1
        self.most = max(self.most, self.now)
        try:
            return await self._stream(word, body, writer)
        finally:
            self.now -= 1

    async def _stream(self, word: str, body: dict[str, Any], writer: asyncio.StreamWriter) -> bool:
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n")
        chat = "messages" in body
        if chat:
            self._event(writer, {"choices": [{"delta": {"role": "assistant", "content": ""}}]})
        count = 0 if word == "empty" else body["max_tokens"]
        for i in range(count):
            if word == "break" and i == 2:
                return False
            if word == "event-error" and i == 2:
                self._event(writer, {"error": {"message": "a rank died"}})
                writer.write(b"0\r\n\r\n")
                return True
            if word == "hang" and i == 2:
                await asyncio.sleep(60)
            self._event(writer, {"choices": [{"delta": {"content": "x"}} if chat else {"text": "x", "finish_reason": None}]})
            await asyncio.sleep(self.gap_s)
        while self.begun < self.hold:
            await asyncio.sleep(0.01)
        self._event(writer, {"choices": [], "usage": {"prompt_tokens": 7, "completion_tokens": count}})
        data = b"data: [DONE]\n\n"
        writer.write(b"%x\r\n%b\r\n0\r\n\r\n" % (len(data), data))
        return True

    def _event(self, writer: asyncio.StreamWriter, data: dict[str, Any]) -> None:
        line = b"data: " + json.dumps(data).encode() + b"\n\n"
        writer.write(b"%x\r\n%b\r\n" % (len(line), line))

    def _whole(self, writer: asyncio.StreamWriter, status: int, data: dict[str, Any]) -> None:
        body = json.dumps(data).encode()
        writer.write(f"HTTP/1.1 {status} X\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body)


@contextmanager
def sse_server(gap_s: float = 0.0, hold: int = 0) -> Iterator[SseServer]:
    """It, in a thread of its own."""
    found, ready, loop = SseServer(gap_s, hold), threading.Event(), asyncio.new_event_loop()
    stop = asyncio.Event()

    async def serve() -> None:
        server = await asyncio.start_server(found.handle, "127.0.0.1", 0, backlog=2048)
        found.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        ready.set()
        await stop.wait()
        rest = asyncio.all_tasks() - {asyncio.current_task()}
        for task in rest:
            task.cancel()
        await asyncio.gather(*rest, return_exceptions=True)

    thread = threading.Thread(target=lambda: loop.run_until_complete(serve()), daemon=True)
    thread.start()
    assert ready.wait(20), "the fake server did not start"
    try:
        yield found
    finally:
        loop.call_soon_threadsafe(stop.set)
        thread.join(20)
        assert not thread.is_alive()
        loop.close()
