"""What the command line says to someone who got it wrong, or who has to wait."""

from __future__ import annotations

import re
import socket
import ssl
import subprocess
import sys
import urllib.error
from collections.abc import Sequence

import pytest

from lockstep.cli import client, flags
from lockstep.cli.errors import UsageError, as_flags
from lockstep.cli.tls import client_context
from lockstep.config.build import build_config
from lockstep.config.endpoint import check_options
from lockstep.config.errors import ConfigError
from lockstep.config.serve import ServeOptions
from lockstep.executor import gather
from lockstep.executor.gather import Door
from lockstep.server.launch import listen
from lockstep.server.middleware import OPEN_PATHS
from lockstep.utils.words import counted, joined


def test_settings_of_the_server_are_named_as_flags() -> None:
    assert as_flags("api_key number 1, port=3 and max_body_bytes=1") == "--api-key number 1, --port=3 and --max-body-bytes=1"


def test_an_address_of_another_machine_is_answered_with_host() -> None:
    with pytest.raises(ConfigError, match="give --host an address of this machine"):
        listen(ServeOptions(host="192.0.2.1", port=0))


@pytest.mark.parametrize("given", [{"port": 0}, {"host": "0.0.0.0"}])
def test_a_path_and_a_port_exclude_each_other(given: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match="leave one out"):
        check_options(ServeOptions(uds="/tmp/x", **given))  # type: ignore[arg-type]


def serve_says(argv: Sequence[str], capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit):
        flags.parse("serve", list(argv), ServeOptions, max_tokens=None, description="", sampling=False)
    said = capsys.readouterr()
    return re.sub(r"[\s│]+", " ", said.out + said.err)


def test_choices_are_shown_in_their_order_and_none_is_not_one(capsys: pytest.CaptureFixture[str]) -> None:
    said = serve_says(["--help"], capsys)
    assert "LITERAL" not in said and "--tool-call-parser {hermes,llama3_json,mistral,pythonic}" in said
    assert "('hermes', 'llama3_json', 'mistral', 'pythonic')" in serve_says(["--tool-call-parser", "foo"], capsys)


def test_what_needs_no_key_is_all_told(capsys: pytest.CaptureFixture[str]) -> None:
    said = serve_says(["--help"], capsys)
    told = said[said.index("--api-key") : said.index("LOCKSTEP_API_KEY")]
    assert all(path in told for path in OPEN_PATHS if path.endswith(("z", "health", "ready")))


def test_a_certificate_that_is_not_trusted_is_called_that(monkeypatch: pytest.MonkeyPatch) -> None:
    class Opener:
        def open(self, *_: object, **__: object) -> None:
            error = ssl.SSLCertVerificationError(1, "failed")
            error.verify_message = "self-signed certificate"
            raise urllib.error.URLError(error)

    monkeypatch.setattr(client, "build_opener", lambda *handlers: Opener())
    with pytest.raises(client.Unreadable, match=r"not trusted \(self-signed certificate\).*--ca-cert FILE; --insecure"):
        client.Server("https://127.0.0.1:1", "").read("/v1/cluster")


def test_what_is_trusted() -> None:
    assert client_context(None, False).verify_mode == ssl.CERT_REQUIRED
    assert client_context(None, True).verify_mode == ssl.CERT_NONE
    for given in (("/nonexistent.pem", False), ("a.pem", True)):
        with pytest.raises(UsageError, match="--ca-cert"):
            client_context(*given)


def test_who_is_awaited_is_said_with_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr(gather._log, "warning", lambda text, *args: said.append(text % args))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    parallel = build_config(tensor_parallel_size=2, nnodes=2, master_port=port).parallel
    door = Door(parallel)
    door.listener.close()
    door.say_who_is_awaited("my model", 600.0)
    assert "no other host can reach it" in said[0]
    assert "waiting for node 1 of 2" in said[1] and "up to 600 s" in said[1]
    assert f"lockstep serve 'my model' -tp 2 -pp 1 --nnodes 2 --node-rank 1 --master-addr {parallel.master_addr}" in said[1]


def test_counts_and_joins() -> None:
    assert [counted(n, "request") for n in (0, 1, 2)] == ["0 requests", "1 request", "2 requests"]
    assert joined("It died.", "b") == "It died. b" and joined("see /tmp/a.json", "b") == "see /tmp/a.json; b"


def test_a_full_disk_is_one_line_and_a_closed_output_none() -> None:
    full = subprocess.run(f"{sys.executable} -m lockstep simulate tp > /dev/full", shell=True, capture_output=True, text=True, check=False)
    assert full.returncode == 1 and full.stderr.count("\n") == 1 and "No space left on device" in full.stderr, full.stderr
    for verb in ("simulate tp", "plan qwen3-0.6b"):
        closed = subprocess.run(f"{sys.executable} -m lockstep {verb} >&-", shell=True, capture_output=True, text=True, check=False)
        assert closed.returncode == 0 and "Traceback" not in closed.stderr, closed.stderr
