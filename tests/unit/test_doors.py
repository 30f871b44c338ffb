"""Where other hosts knock: ports that are none, addresses that nobody can reach, and doors without a key."""

from __future__ import annotations

import logging
from dataclasses import replace

import pytest

from lockstep.cluster.doorman import Doorman
from lockstep.config.build import build_config
from lockstep.config.errors import ConfigError
from lockstep.config.nodes import check_nodes
from lockstep.executor.gather import Door
from lockstep.utils import env, net

NODES = {"nnodes": 2, "tensor_parallel_size": 2}


@pytest.mark.parametrize("text", ["99999", "abc", "-1", "1.5", "²", "65536", "9" * 5000])
def test_a_port_that_is_none_is_refused_with_its_variable(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCKSTEP_PORT", text)
    with pytest.raises(ValueError, match=r"LOCKSTEP_PORT=.* it must be a whole number from 1 to 65535"):
        env.rendezvous_port()
    with pytest.raises(ConfigError, match=r"LOCKSTEP_PORT=.* it must be a whole number from 1 to 65535"):
        check_nodes(build_config(**NODES).parallel)


@pytest.mark.parametrize(("text", "port"), [("", 0), (" ", 0), ("0", 0), ("1", 1), (" 65535 ", 65535)])
def test_a_port_is_taken_as_it_is(text: str, port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCKSTEP_PORT", text)
    assert env.rendezvous_port() == port
    check_nodes(build_config(**NODES).parallel)


def test_a_port_without_hosts_is_nobodys_business(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCKSTEP_PORT", "abc")
    check_nodes(build_config(tensor_parallel_size=2).parallel)


@pytest.mark.parametrize("port", [65536, 99999, -1])
def test_a_listener_says_which_port_is_none(port: int) -> None:
    with pytest.raises(OSError, match=rf"cannot listen on 127\.0\.0\.1:{port}: a port is a number up to 65535"):
        net.Listener(port=port)


def test_addresses_that_stand_for_all() -> None:
    assert net.is_any("0.0.0.0") and net.is_any("::")
    assert not net.is_any("10.0.0.1") and not net.is_any("head") and not net.is_any("")


@pytest.mark.parametrize("kind", ["nodes", "replicas"])
def test_a_door_to_the_network_without_a_key_warns_once(
    kind: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    parallel = replace(build_config(**NODES).parallel, master_port=0, data_parallel_rpc_port=0)

    def opened(address: str, key: str) -> list[str]:
        monkeypatch.setenv("LOCKSTEP_HOST_IP", address)
        monkeypatch.setenv("LOCKSTEP_CLUSTER_KEY", key)
        caplog.clear()
        if kind == "nodes":
            Door(parallel).listener.close()
        else:
            Doorman(parallel, {}).close()
        return [record.message for record in caplog.records if record.levelno >= logging.WARNING]

    (warning,) = opened("0.0.0.0", "")
    assert "LOCKSTEP_CLUSTER_KEY is not set" in warning and "can join; set the same secret on every" in warning
    assert opened("0.0.0.0", "secret") == opened("127.0.0.1", "") == []
