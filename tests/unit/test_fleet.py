"""The leader's door and its fleet, with replicas that are sockets of this very process: no engine, no process."""

from __future__ import annotations

import contextlib
import os
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from lockstep.cluster import doorman, fleet, greeting, wire
from lockstep.cluster.doorman import Arrival, Doorman
from lockstep.cluster.fleet import Event, Fleet, Lost, Said
from lockstep.cluster.greeting import Identity
from lockstep.cluster.remote import RemoteReplica
from lockstep.cluster.supervisor import RestartPolicy, State
from lockstep.config.errors import ConfigError
from lockstep.config.tree import EngineConfig
from lockstep.engine.sizing import MemoryPlan
from lockstep.engine.stats import EngineLoad
from lockstep.executor.contract import ExecutorError
from lockstep.testing.executors import SPEC, fake_config
from lockstep.utils import net
from lockstep.utils.frames import receive_one, send_one

KEY = "of these tests"


def config_of(replicas: int = 1, **parallel: object) -> EngineConfig:
    """Of a leader that runs no replica itself, behind a port that the system chooses."""
    config = fake_config(1)
    here = {"data_parallel_size": replicas, "data_parallel_size_local": 0, "data_parallel_rpc_port": 0}
    return replace(config, parallel=replace(config.parallel, **{**here, **parallel}))


@pytest.fixture
def alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Fleet]:
    """A fleet of one replica, which has to come."""
    monkeypatch.setenv("LOCKSTEP_CLUSTER_KEY", KEY)
    made = Fleet(config_of(), SPEC, tmp_path, RestartPolicy(first_s=0.0, most_failures=3))
    yield made
    made.close()


def come(door: Doorman, config: EngineConfig, folder: Path) -> socket.socket:
    """Be a replica that its keeper brings."""
    lockstep, torch = greeting.versions()
    who = Identity(0, b"keeper", "elsewhere", 7, lockstep, torch, greeting.agreed_settings(config, SPEC, folder))
    connection = socket.create_connection((door.host, door.port), 5)
    greeting.greet(connection, KEY, who, time.monotonic() + 5)
    return connection


def arrive(made: Fleet, folder: Path) -> socket.socket:
    """A replica whose connection the fleet has taken."""
    assert made._doorman is not None
    connection = come(made._doorman, made._config, folder)
    until = time.monotonic() + 5
    while made._replicas[0] is None:
        assert time.monotonic() < until
        assert not list(made.pump(0.1))
    return connection


def say(connection: socket.socket, *messages: object) -> None:
    for message in messages:
        send_one(connection, message if isinstance(message, bytes) else wire.encode(message), time.monotonic() + 5)


def events(made: Fleet, count: int) -> list[Event]:
    found: list[Event] = []
    until = time.monotonic() + 5
    while len(found) < count:
        assert time.monotonic() < until, found
        found += made.pump(0.1)
    return found


READY = wire.Ready(config_of(), MemoryPlan(8, 16, 4, 64, 128, (), "the test"))


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (wire.Ready(READY.config, READY.memory), "said that it is ready when it was"),
        (wire.News([], EngineLoad(0, -1, 0), 0), "reported a load that cannot be"),
        (b"\xff is no message", "said what cannot be decoded"),
        (b"\x98\xa6failed\xa1\xff\xc0\xa0\xc0\xa0\xa0\x90", "said what cannot be decoded"),
    ],
    ids=["ready-twice", "load", "garbage", "broken-utf8"],
)
def test_a_replica_that_says_what_cannot_be_is_lost(alone: Fleet, tmp_path: Path, words: object, why: str) -> None:
    """And nobody else: the router's step goes on."""
    with arrive(alone, tmp_path) as connection:
        say(connection, READY)
        said = events(alone, 1)[0]
        assert isinstance(said, Said) and alone.supervisor.lives[0].state is State.READY
        say(connection, words)
        lost = events(alone, 1)[0]
        assert isinstance(lost, Lost) and why in str(lost.error)
        assert alone.supervisor.lives[0].failures == 1
        assert connection.recv(1) == b"", "it is hung up on"


def test_news_before_it_is_ready(alone: Fleet, tmp_path: Path) -> None:
    with arrive(alone, tmp_path) as connection:
        say(connection, wire.News([], None, 0))
        lost = events(alone, 1)[0]
        assert isinstance(lost, Lost) and "said News before it was ready" in str(lost.error)


def test_the_end_of_a_replica_never_raises() -> None:
    ours, theirs = socket.socketpair()
    with theirs:
        say(theirs, b"\xff is no message")
        handle = RemoteReplica(Arrival(0, ours, "elsewhere", b"keeper"))
        handle.end(ask=True, until_s=time.monotonic() + 5)
        assert theirs.recv(1) == b"" and ours.fileno() < 0
        handle.end(ask=True, until_s=time.monotonic() + 5)


def test_who_comes_during_the_end_is_told(alone: Fleet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its greeting is over only when the fleet has taken its last look."""
    judging, looked = threading.Event(), threading.Event()
    judge, arrived = Doorman._judge, Doorman.arrived

    def slowly(self: Doorman, *args: object) -> object:
        judging.set()
        looked.wait(0.5)
        return judge(self, *args)  # type: ignore[arg-type]

    def look(self: Doorman) -> list[Arrival]:
        found = arrived(self)
        looked.set()
        return found

    monkeypatch.setattr(Doorman, "_judge", slowly)
    monkeypatch.setattr(Doorman, "arrived", look)
    found: list[bytes] = []

    def guest() -> None:
        assert alone._doorman is not None
        with contextlib.suppress(OSError), come(alone._doorman, alone._config, tmp_path) as connection:
            found.append(receive_one(connection, time.monotonic() + 5, 100))

    thread = threading.Thread(target=guest)
    thread.start()
    assert judging.wait(5)
    alone.close()
    thread.join(10)
    assert [type(wire.decode_order(message)) for message in found] == [wire.Stop]


def test_who_is_greeted_even_later_is_told_too(alone: Fleet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doorman, "LAST_GREETINGS_S", 0.0)
    judging, closed = threading.Event(), threading.Event()
    judge = Doorman._judge

    def slowly(self: Doorman, *args: object) -> object:
        judging.set()
        closed.wait(5)
        return judge(self, *args)  # type: ignore[arg-type]

    monkeypatch.setattr(Doorman, "_judge", slowly)
    found: list[bytes] = []

    def guest() -> None:
        assert alone._doorman is not None
        with come(alone._doorman, alone._config, tmp_path) as connection:
            found.append(receive_one(connection, time.monotonic() + 5, 100))

    thread = threading.Thread(target=guest)
    thread.start()
    assert judging.wait(5)
    alone.close()
    closed.set()
    thread.join(10)
    assert [type(wire.decode_order(message)) for message in found] == [wire.Stop]


# --- what Ray starts ---


class Actors:
    """Stands in for `cluster.ray.ReplicaActors`."""

    key = KEY

    def __init__(self, config: EngineConfig) -> None:
        self.config = replace(config, parallel=replace(config.parallel, data_parallel_size_local=0, data_parallel_rpc_port=0))
        self.over: dict[int, str] = {}
        self.began: list[object] = []
        self.closed = 0

    def start(self, spec: object, folder: Path, host: str, port: int) -> None:
        self.began.append((host, port))

    def start_again(self, replica: int) -> None:
        self.began.append(replica)

    def ended(self) -> dict[int, str]:
        over, self.over = self.over, {}
        return over

    def words(self, absent: list[int]) -> str:
        return f"no word of {absent}"

    def close(self) -> None:
        self.closed += 1


@pytest.fixture
def actors(monkeypatch: pytest.MonkeyPatch) -> list[Actors]:
    """Those that were made, in order."""
    made: list[Actors] = []

    def make(config: EngineConfig) -> Actors:
        made.append(Actors(config))
        return made[-1]

    monkeypatch.setattr("lockstep.cluster.ray.ReplicaActors", make)
    monkeypatch.setattr(fleet, "LOOK_S", 0.0)
    return made


def test_actors_are_told_where_the_door_is(actors: list[Actors], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCKSTEP_HOST_IP", "127.0.0.2")
    made = Fleet(config_of(2, data_parallel_backend="ray"), SPEC, tmp_path, None)
    assert made._doorman is not None
    assert actors[0].began == [("127.0.0.2", made._doorman.port)]
    made.close()
    made.close()
    assert actors[0].closed == 1


def test_no_door_ends_what_ray_was_joined_for(actors: list[Actors], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCKSTEP_HOST_IP", "203.0.113.7")
    with pytest.raises(
        ConfigError, match=r"data_parallel_backend='ray': this process cannot listen on 203\.0\.113\.7.*LOCKSTEP_HOST_IP"
    ) as e:
        Fleet(config_of(2, data_parallel_backend="ray"), SPEC, tmp_path, None)
    assert "data_parallel_address" not in str(e.value) and "another port" not in str(e.value), "the user gave neither"
    assert actors[0].closed == 1


def test_an_actor_that_ends_before_its_replica_ever_came_is_said_at_once(actors: list[Actors], tmp_path: Path) -> None:
    made = Fleet(config_of(2, data_parallel_backend="ray"), SPEC, tmp_path, None)
    actors[0].over = {1: "no such model here"}
    with pytest.raises(ExecutorError, match=r"replica 1, which Ray was to start, did not come: no such model here\.$"):
        events(made, 1)
    made.close()


def test_an_actor_that_ends_later_is_replaced_until_its_replica_is_given_up(actors: list[Actors], tmp_path: Path) -> None:
    made = Fleet(config_of(1, data_parallel_backend="ray"), SPEC, tmp_path, RestartPolicy(first_s=0.0, most_failures=3))
    with arrive(made, tmp_path) as connection:
        say(connection, READY)
        assert isinstance(events(made, 1)[0], Said)
    assert isinstance(events(made, 1)[0], Lost)
    for number in range(1, 3):
        assert not list(made.pump(0.0))
        assert actors[0].began[1:] == [0] * number, "a new actor for replica 0"
        actors[0].over = {0: "it was evicted"}
        lost = events(made, 1)[0]
        assert isinstance(lost, Lost) and "did not come: it was evicted." in str(lost.error)
    assert made.supervisor.hopeless
    assert made.late().startswith("replica 0 was given up after 3 failures in a row, the last one: replica 0, which Ray")
    made.close()


# --- what a start is told ---


def refused(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """No replica can be started from here on: what each start is told, whether others follow should it fail."""
    told: list[bool] = []

    def refuse(*args: object, again: bool) -> None:
        told.append(again)
        raise OSError("not now")

    monkeypatch.setattr(fleet, "ReplicaProcess", refuse)
    return told


@pytest.mark.parametrize("replaced", [False, True])
def test_a_first_start_that_fails_is_the_last_but_where_the_process_is_replaced(
    replaced: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = refused(monkeypatch)
    with pytest.raises(OSError, match="not now"):
        Fleet(config_of(1, data_parallel_size_local=1), SPEC, tmp_path, None, replaced=replaced)
    assert told == [replaced]


def test_a_start_after_the_first_is_told_that_others_follow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Fleet, "_start", lambda self, replica: None)
    made = Fleet(config_of(1, data_parallel_size_local=1), SPEC, tmp_path, RestartPolicy(first_s=0.0))
    monkeypatch.undo()
    told = refused(monkeypatch)
    made.supervisor.failed(0, time.monotonic())
    assert isinstance(events(made, 1)[0], Lost) and told == [True]
    made.close()


# --- limits ---


@pytest.mark.parametrize(("nodes", "several"), [(1, False), (4, True)])
def test_who_is_late_was_waited_for_as_long_as_is_said(nodes: int, several: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Over several hosts that is longer than startup_timeout_seconds: for the hosts, and then for their ranks."""
    monkeypatch.setattr(Fleet, "_start", lambda self, replica: self._replicas.__setitem__(replica, object()))
    config = config_of(2, nnodes=nodes, tensor_parallel_size=2, data_parallel_size_local=None)
    made = Fleet(config, SPEC, tmp_path, None)
    said = made.late()
    made._replicas[:] = [None, None]
    made.close()
    assert said == f"replicas [0, 1] were not ready after {config.start_limit_s:g} s (see startup_timeout_seconds)."
    assert (config.start_limit_s > config.runtime.startup_timeout_seconds) is several


# --- addresses ---


def test_a_name_that_is_loopback_here_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """As Debian has the host's own name in /etc/hosts: replicas of other hosts would find nobody."""
    monkeypatch.setattr(net, "resolve", lambda host: "127.0.1.1")
    with pytest.raises(ConfigError, match=r"data_parallel_address='box0' is 127\.0\.1\.1 on this host, which no other host can reach"):
        Doorman(config_of(2, data_parallel_address="box0").parallel, {}, KEY)


def test_the_named_interface_is_the_doors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCKSTEP_INTERFACE", net.loopback_interface())
    door = Doorman(config_of(2, data_parallel_address="192.0.2.77").parallel, {}, KEY)
    assert net.is_loopback(door.host) and door.at.endswith(f":{door.port}") and door.port
    door.close()
    monkeypatch.setenv("LOCKSTEP_INTERFACE", "nosuch0")
    with pytest.raises(ConfigError, match="LOCKSTEP_INTERFACE=nosuch0 has no address on this host"):
        Doorman(config_of(2).parallel, {}, KEY)


def test_a_forked_child_ends_nothing(alone: Fleet, tmp_path: Path) -> None:
    with arrive(alone, tmp_path) as connection:
        pid = os.fork()
        if pid == 0:
            alone.close()
            alone._finalizer()
            os._exit(0)
        assert os.waitpid(pid, 0)[1] == 0
        connection.settimeout(0.2)
        with pytest.raises(TimeoutError):
            connection.recv(1)
        connection.settimeout(5)
        say(connection, READY)
        assert isinstance(events(alone, 1)[0], Said)
