"""Takes requests and answers 400 to each, without a look at them: what it costs the machine to send them, and nothing else.

`python -m tests.server.sink` prints its port, and serves until stdin ends.
"""

from __future__ import annotations

import asyncio
import re
import sys

READ_S = 2.0
LENGTH = re.compile(rb"\r\ncontent-length: *(\d{1,9})\r\n", re.IGNORECASE)
ANSWER = b"HTTP/1.1 400 Bad Request\r\ncontent-type: application/json\r\ncontent-length: 2\r\n\r\n{}"


async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """One connection, for as long as it is HTTP."""
    try:
        while True:
            async with asyncio.timeout(READ_S):
                head = await reader.readuntil(b"\r\n\r\n")
                found = LENGTH.search(head)
                left = int(found[1]) if found else 0
                while left and (part := await reader.read(left)):
                    left -= len(part)
            writer.write(ANSWER)
            if not found:
                break
    except (TimeoutError, asyncio.IncompleteReadError, asyncio.LimitOverrunError, ConnectionError):
        writer.write(ANSWER)
    finally:
        writer.close()


async def main() -> None:
    server = await asyncio.start_server(answer, "127.0.0.1", 0, limit=1 << 20)
    print(server.sockets[0].getsockname()[1], flush=True)
    async with server:
        await asyncio.to_thread(sys.stdin.read)


if __name__ == "__main__":
    asyncio.run(main())
