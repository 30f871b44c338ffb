"""What a connection may take before its request reaches the application: heads, waiting, sockets; and TLS."""

from __future__ import annotations

import asyncio
import shutil
import socket
import ssl
import subprocess
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from lockstep.config.endpoint import check_options
from lockstep.config.errors import ConfigError
from lockstep.config.serve import ServeOptions
from lockstep.server.launch import listen
from lockstep.server.launch_http import make_server
from tests.server.edge_app import BUSY, make_app, make_state

HEAD = b"POST /tokenize HTTP/1.1\r\nHost: x\r\n"


@asynccontextmanager
async def serving(**options: Any) -> AsyncIterator[tuple[int, Any]]:
    """(port, state) of the application of `edge_app` on real sockets."""
    state = make_state(port=0, **options)
    listener = listen(state.options)
    server = make_server(make_app(state), state.options)
    task = asyncio.create_task(server.serve(sockets=[listener]))
    try:
        yield listener.getsockname()[1], state
    finally:
        server.should_exit = server.force_exit = True
        await task


async def talk(port: int, *parts: bytes, pause_s: float = 0.0, more: bool = False) -> bytes:
    """Say the parts, with pauses between, and hear until the server hangs up (or, with `more`, until it says something)."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        for part in parts:
            writer.write(part)
            await writer.drain()
            await asyncio.sleep(pause_s)
        return await asyncio.wait_for(reader.read(1 << 16) if more else reader.read(), 30)
    except ConnectionError:
        return b""
    finally:
        writer.close()


def run(work: Any) -> Any:
    return asyncio.run(asyncio.wait_for(work, 100))


def status_of(answer: bytes) -> int:
    return int(answer.split(b" ", 2)[1]) if answer else 0


def test_a_head_has_a_limit_however_it_comes() -> None:
    async def walk() -> None:
        async with serving(max_header_bytes=1000) as (port, _):
            fits = HEAD + b"X: " + b"a" * 900 + b"\r\nContent-Length: 2\r\nConnection: close\r\n\r\n{}"
            assert status_of(await talk(port, fits)) == 200
            for whole in (
                HEAD + b"X: " + b"a" * 1000 + b"\r\n\r\n",  # one long line
                HEAD + b"X: y\r\n" * 200 + b"\r\n",  # many short ones
                b"GET /" + b"a" * 1000 + b" HTTP/1.1\r\n\r\n",
            ):
                assert status_of(await talk(port, whole)) == 431
            endless = await talk(port, HEAD + b"X: ", *[b"a" * 100] * 20, pause_s=0.001)  # never ends
            assert status_of(endless) in (431, 0)  # 0: hung up on while it was still sending
            trailers = HEAD + b"Transfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\n" + b"X: y\r\n" * 400
            assert status_of(await talk(port, trailers)) in (431, 0)
            assert status_of(await talk(port, fits)) == 200

    run(walk())


@pytest.mark.parametrize("parts", [(), (b"POST",), (b"\r\n", b"\r\n"), (HEAD + b"X: y\r\n",), (HEAD + b"Content-Length: 5\r\n\r\n", b"{")])
def test_a_client_that_does_not_go_on_is_hung_up_on(parts: tuple[bytes, ...]) -> None:
    async def walk() -> None:
        async with serving(request_read_timeout=0.3) as (port, _):
            start_s = time.monotonic()
            assert status_of(await talk(port, *parts, pause_s=0.05)) == 408
            assert time.monotonic() - start_s >= 0.3

    run(walk())


def test_a_dripping_client_is_not_kept() -> None:
    async def walk() -> None:
        async with serving(request_read_timeout=0.5) as (port, _):
            for drip in ([HEAD, *[b"X: y\r\n"] * 20], [HEAD + b"Content-Length: 100\r\n\r\n", *[b" "] * 20], [b"\r\n"] * 20):
                assert status_of(await talk(port, *drip, pause_s=0.1)) in (408, 0)

    run(walk())


def test_a_slow_answer_is_no_slow_client() -> None:
    """Also not while a second request waits behind it on the same connection."""

    async def walk() -> None:
        async with serving(request_read_timeout=0.2) as (port, state):
            body = b'{"do": "wait", "prompt": "x"}'
            ask = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body)
            last = HEAD + b"Content-Length: 2\r\nConnection: close\r\n\r\n"
            talking = asyncio.create_task(talk(port, ask, last))
            while not state.running:
                await asyncio.sleep(0.01)
            await asyncio.sleep(0.7)
            assert not talking.done()
            await state.engine.abort(["waiting"])
            answers = await talking
            assert status_of(answers) == 200
            assert b" 408 " in answers  # the second one's body never came, and nobody waits for it any longer

    run(walk())


def test_open_connections_are_bounded_and_places_become_free() -> None:
    async def walk() -> None:
        async with serving(limit_concurrency=2) as (port, _):
            idle = [await asyncio.open_connection("127.0.0.1", port) for _ in range(2)]
            await asyncio.sleep(0.1)
            assert status_of(await talk(port, HEAD + b"\r\n")) in (503, 0)
            for _, writer in idle:
                writer.close()
            await asyncio.sleep(0.1)
            assert status_of(await talk(port, b"GET /livez HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")) == 200

    run(walk())


@pytest.mark.parametrize(
    "whole",
    [
        *(b"\x16\x03\x01\x00\xa5", b"\x00" * 100, b"GET\r\n\r\n", b"FOO / HTTP/9.9\r\n\r\n", b"GET /\xff HTTP/1.1\r\nHost: x\r\n\r\n"),
        b"POST /tokenize HTTP/1.1\r\nHost: x\r\nContent-Length: -5\r\n\r\n",
        b"POST /tokenize HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        b"POST /tokenize HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    ],
)
def test_what_is_no_http_is_refused_and_nobody_else_notices(whole: bytes) -> None:
    async def walk() -> None:
        async with serving(request_read_timeout=0.5) as (port, _):
            assert status_of(await talk(port, whole)) in (0, 400, 404, 405, 408, 505)
            assert status_of(await talk(port, b"GET /livez HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")) == 200

    run(walk())


def test_a_client_that_sends_too_much_still_reads_why() -> None:
    async def walk() -> None:
        async with serving(max_body_bytes=1000) as (port, _), httpx.AsyncClient() as client:
            answer = await client.post(f"http://127.0.0.1:{port}/tokenize", content=b" " * 5_000_000)
            assert answer.status_code == 413
            assert (await client.post(f"http://127.0.0.1:{port}/v1/completions", json=BUSY.echo)).status_code == 200

    run(walk())


# --- ports and TLS ---


def test_a_port_is_one_servers() -> None:
    with listen(ServeOptions(port=0)) as first:
        port = first.getsockname()[1]
        with pytest.raises(ConfigError, match=f"port={port} cannot be listened at"):
            listen(ServeOptions(port=port))
        assert first.getsockname()[0] == "127.0.0.1"  # by default nobody else reaches it
        assert not first.getsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT)


def test_a_socket_file_that_a_dead_server_left_is_taken_over(tmp_path: Path) -> None:
    path = str(tmp_path / "api")
    with listen(ServeOptions(uds=path)), pytest.raises(ConfigError, match="cannot be listened at"):
        listen(ServeOptions(uds=path))
    listen(ServeOptions(uds=path)).close()
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ConfigError):
        listen(ServeOptions(uds=str(tmp_path / "file")))
    assert (tmp_path / "file").read_text() == "mine"


def certificate(folder: Path, name: str) -> dict[str, str]:
    """A certificate for 127.0.0.1 that vouches for itself, made by openssl."""
    assert shutil.which("openssl"), "this test makes its certificate with the openssl command: install it"
    key, cert = folder / f"{name}.key", folder / f"{name}.pem"
    made = ["req", "-x509", "-newkey", "rsa:2048", "-nodes", "-keyout", str(key), "-out", str(cert), "-days", "2"]
    subprocess.run(
        ["openssl", *made, "-subj", f"/CN={name}", "-addext", "subjectAltName=IP:127.0.0.1"], check=True, capture_output=True, timeout=60
    )
    return {"ssl_keyfile": str(key), "ssl_certfile": str(cert)}


def test_https_and_client_certificates(tmp_path: Path) -> None:
    own, clients = certificate(tmp_path, "server"), certificate(tmp_path, "client")
    trusting = ssl.create_default_context(cafile=own["ssl_certfile"])
    known = ssl.create_default_context(cafile=own["ssl_certfile"])
    known.load_cert_chain(clients["ssl_certfile"], clients["ssl_keyfile"])

    async def status(port: int, verify: Any) -> int:
        async with httpx.AsyncClient(verify=verify) as client:
            return (await client.get(f"https://127.0.0.1:{port}/livez")).status_code

    async def walk() -> None:
        async with serving(**own) as (port, _):
            assert await status(port, trusting) == 200
            with pytest.raises(httpx.TransportError):
                await status(port, True)  # nobody vouches for it there
        async with serving(**own, ssl_ca_certs=clients["ssl_certfile"], ssl_cert_reqs=2) as (port, _):
            assert await status(port, known) == 200
            with pytest.raises(httpx.TransportError):
                await status(port, trusting)

    check_options(ServeOptions(**own))  # type: ignore[arg-type]
    run(walk())
    wrong = {"ssl_keyfile": clients["ssl_keyfile"], "ssl_certfile": own["ssl_certfile"]}
    with pytest.raises(ConfigError, match="belong together"):
        check_options(ServeOptions(**wrong))  # type: ignore[arg-type]
    for broken in (clients["ssl_keyfile"], __file__):
        with pytest.raises(ConfigError, match=r"ssl_ca_certs='.*' cannot be used: .*: give a file of certificates in PEM"):
            check_options(ServeOptions(**own, ssl_ca_certs=broken, ssl_cert_reqs=2))  # type: ignore[arg-type]
