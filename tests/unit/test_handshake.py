"""The proof of a shared secret, and what hosts must agree on before one keeps replicas of another's engine."""

from __future__ import annotations

import shutil
import socket
import threading
import time
from pathlib import Path

import msgspec
import pytest

from lockstep.cluster import greeting
from lockstep.cluster.greeting import AGREED, Identity, Refused, RefusedError, Welcome
from lockstep.config.build import build_config
from lockstep.config.source import DEMO_FOLDER
from lockstep.config.validate import resolve
from lockstep.utils.frames import receive_one, send_one
from lockstep.utils.handshake import prove, proven
from lockstep.utils.net import prepare_link


def test_only_the_same_key_side_and_words_prove_anything() -> None:
    proof = prove("key", "leader", b"ab", b"c")
    assert proven(proof, "key", "leader", b"ab", b"c")
    for wrong in (("KEY", "leader", b"ab", b"c"), ("key", "agent", b"ab", b"c"), ("key", "leader", b"a", b"bc"), ("key", "leader", b"ab")):
        assert not proven(proof, wrong[0], wrong[1], *wrong[2:])
    assert not proven(b"", "key", "leader", b"ab", b"c") and proven(prove("", "x"), "", "x")


@pytest.fixture(scope="module")
def settings() -> dict[str, str]:
    return greeting.agreed_settings(*resolve(build_config(device="cpu")))


def identity(settings: dict[str, str]) -> Identity:
    return Identity(1, b"k", "host", 1, "1.0", "2.0", settings)


def test_settings_are_those_that_decide_answers(settings: dict[str, str]) -> None:
    assert set(AGREED) < set(settings) and {"model", "load_format", "LOCKSTEP_KERNELS"} < set(settings)
    assert greeting.misfit(identity(dict(settings)), ("1.0", "2.0"), settings) == ""
    for name in settings:
        said = greeting.misfit(identity({**settings, name: "other"}), ("1.0", "2.0"), settings)
        assert name in said and "every host" in said
    assert "has seed=nothing" in greeting.misfit(identity({n: v for n, v in settings.items() if n != "seed"}), ("1.0", "2.0"), settings)
    assert "lockstep 1.0 and the leader 1.1" in greeting.misfit(identity(settings), ("1.1", "2.0"), settings)


def test_a_model_counts_by_what_is_in_its_folder(settings: dict[str, str], tmp_path: Path) -> None:
    def model(folder: Path, **more: object) -> str:
        return greeting.agreed_settings(*resolve(build_config(model=str(folder), device="cpu", **more)))["model"]

    copy = tmp_path / "copy"
    shutil.copytree(DEMO_FOLDER, copy)
    assert model(copy) == settings["model"], "the same files in another folder"
    dummy = model(copy, load_format="dummy")
    weights = next(copy.glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x01")
    assert model(copy) != settings["model"]
    assert model(copy, load_format="dummy") == dummy, "weights that nobody reads"


def greeted(answer: object) -> None:
    """The keeper's greeting, with a leader that answers this."""
    ours, theirs = socket.socketpair()

    def leader() -> None:
        until = time.monotonic() + 5
        send_one(theirs, msgspec.msgpack.encode(greeting.Challenge(greeting.PROTOCOL, b"n")), until)
        hello = greeting.decode_hello(receive_one(theirs, until, greeting.MOST_BYTES))
        assert proven(hello.proof, "key", greeting.KEEPER, b"n", hello.nonce, hello.identity)
        sent = Welcome(prove("key", greeting.LEADER, hello.nonce, b"n", hello.identity)) if answer == "right" else answer
        send_one(theirs, msgspec.msgpack.encode(sent), until)
        send_one(theirs, b"for who comes next", until)

    thread = threading.Thread(target=leader)
    thread.start()
    try:
        greeting.greet(ours, "key", identity({}), time.monotonic() + 5)
        assert receive_one(ours, time.monotonic() + 5, 100) == b"for who comes next", "not a byte more was taken"
    finally:
        thread.join()
        ours.close()
        theirs.close()


def test_the_leader_has_to_prove_the_key_too() -> None:
    greeted("right")
    with pytest.raises(RefusedError, match="leader does not have this host's LOCKSTEP_CLUSTER_KEY"):
        greeted(Welcome(b"anything"))
    with pytest.raises(RefusedError, match="no room") as found:
        greeted(Refused("no room", again=True))
    assert found.value.again
    with pytest.raises(ConnectionAbortedError, match="no greeting of ours"):
        greeted("nonsense")


def test_one_message_has_a_deadline_and_a_limit() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        with pytest.raises(TimeoutError):
            receive_one(ours, time.monotonic() + 0.05, 10)
        send_one(theirs, b"x" * 11, time.monotonic() + 1)
        with pytest.raises(ConnectionAbortedError, match="11 bytes"):
            receive_one(ours, time.monotonic() + 1, 10)
        theirs.close()
        with pytest.raises(ConnectionResetError):
            receive_one(ours, time.monotonic() + 1, 1 << 40)
            receive_one(ours, time.monotonic() + 1, 1 << 40)


def test_a_link_gives_up_on_a_silent_host() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server, socket.create_connection(server.getsockname()) as link:
        prepare_link(link, 10.0)
        assert link.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) == 10_000
        assert link.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE) == 2
        assert link.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) and link.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
