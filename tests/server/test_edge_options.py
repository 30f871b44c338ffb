"""Impossible settings of the server are refused before anything starts, by name and with what to do."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from lockstep.cli.serve import run
from lockstep.config import devices
from lockstep.config.build import build_config
from lockstep.config.endpoint import check_options, for_endpoint, is_open
from lockstep.config.errors import ConfigError
from lockstep.config.replicas import check_replicas
from lockstep.config.serve import ServeOptions
from lockstep.config.tree import EngineConfig, RuntimeConfig
from lockstep.config.validate import pick_device
from lockstep.executor import affinity
from lockstep.utils import env


@pytest.mark.parametrize(
    ("settings", "word"),
    [
        ({"api_server_count": 0}, "api_server_count=0"),
        ({"api_server_count": 65}, "api_server_count=65"),
        ({"port": 65536}, "port=65536"),
        ({"port": -1}, "port=-1"),
        ({"max_body_bytes": "much"}, "max_body_bytes='much'"),
        ({"max_body_bytes": 0}, "max_body_bytes=0"),
        ({"request_timeout": float("nan")}, "request_timeout=nan"),
        ({"shutdown_timeout": -1.0}, "shutdown_timeout=-1"),
        ({"max_num_queued_reqs": -1}, "max_num_queued_reqs=-1"),
        ({"root_path": "llm"}, "root_path='llm'"),
        ({"root_path": "/llm/"}, "root_path='/llm/'"),
        ({"api_key": [""]}, "api_key number 1"),
        ({"api_key": ["good", "b\nad"]}, "api_key number 2"),
        ({"api_key": ["schlüssel"]}, "api_key number 1"),
        ({"ssl_keyfile": "/no/such"}, "ssl_keyfile='/no/such'"),
        ({"ssl_cert_reqs": 3}, "ssl_cert_reqs=3"),
        ({"ssl_cert_reqs": 2}, "ssl_ca_certs"),
        ({"allowed_origins": ["*"], "allow_credentials": True}, "allow_credentials"),
        ({"allowed_origins": ["https://a.example", "null"], "allow_credentials": True}, "allow_credentials with allowed_origins 'null'"),
        *(
            ({"allowed_origins": ["*", origin]}, f"allowed_origins='{origin}' is no origin")
            for origin in (
                "foo",
                "",
                "a.example",
                "https://",
                "https://a.example/",
                "https://A.example",
                "http://a:80",
                "*.a",
                "http://a:b",
                "https://*.example.com",
                "https://bücher.example",
                "http://a:65536",
            )
        ),
        ({"served_model_name": ["m", ""]}, "served_model_name='' is no name"),
        ({"served_model_name": [" "]}, "served_model_name='' is no name"),
        ({"allowed_methods": ["GET"]}, "allowed_methods without allowed_origins"),
    ],
)
def test_refused(settings: dict[str, Any], word: str) -> None:
    with pytest.raises(ConfigError) as error:
        check_options(ServeOptions(**settings))
    assert word in str(error.value) and "schl" not in str(error.value) and "ad'" not in str(error.value)


def test_origins_as_browsers_send_them() -> None:
    origins = ["*", "https://a.example", "http://localhost:5173", "http://[::1]:8080", "null", "chrome-extension://abc", "https://a:80"]
    assert check_options(ServeOptions(allowed_origins=origins)).allowed_origins == origins


def test_sizes_and_keys_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCKSTEP_API_KEY", "from-env other")
    options = check_options(ServeOptions(api_key=["flag"], max_body_bytes="2M"))  # type: ignore[arg-type]
    assert options.max_body_bytes == 2 << 20 and options.api_key == ["flag", "from-env", "other"]
    assert "LOCKSTEP_API_KEY" not in env.child_environment() and "LOCKSTEP_API_KEY" not in env.for_other_hosts()


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, False),
        ({"host": "::1"}, False),
        ({"host": "0.0.0.0"}, True),
        ({"host": "0.0.0.0", "api_key": ["k"]}, False),
        ({"host": "0.0.0.0", "uds": "/x"}, False),
    ],
)
def test_open_to_others_without_a_key_is_noticed(settings: dict[str, Any], expected: bool) -> None:
    assert is_open(ServeOptions(**settings)) is expected


def test_a_hosts_own_endpoint_has_its_own_replicas() -> None:
    config = build_config(data_parallel_size=4, data_parallel_size_local=2, data_parallel_start_rank=2)
    parallel = for_endpoint(config, ServeOptions(data_parallel_hybrid_lb=True)).parallel
    assert (parallel.replicas_led, parallel.replicas_served, parallel.ranks_here) == (2, 2, 2)
    assert list(parallel.replica_numbers) == [2, 3], "whoever reads them knows them from other hosts'"
    kept = [replace(parallel, data_parallel_rank=number) for number in (2, 3)]
    assert [(one.local_replica, one.first_device, list(one.replica_numbers)) for one in kept] == [(0, 0, [2]), (1, 1, [3])]
    check_replicas(parallel, hybrid=True)
    with pytest.raises(ConfigError, match="without headless"):
        check_replicas(parallel)
    assert for_endpoint(EngineConfig(), ServeOptions()) == EngineConfig()
    first = for_endpoint(
        build_config(data_parallel_size=4, data_parallel_size_local=2), ServeOptions(data_parallel_hybrid_lb=True)
    ).parallel
    assert list(first.replica_numbers) == [0, 1] and first.replicas_led == 2


@pytest.mark.parametrize("flags", [["-dph"], ["-dpe"], ["-asc", "2"]])
def test_a_headless_host_is_no_endpoint(flags: list[str]) -> None:
    name = {"-dph": "data_parallel_hybrid_lb", "-dpe": "data_parallel_external_lb", "-asc": "api_server_count=2"}[flags[0]]
    with pytest.raises(ConfigError, match=f"{name} with headless"):
        run(["--headless", "-dp", "2", "-dpl", "1", "-dpr", "1", "--startup-timeout-seconds", "1", *flags])


def test_a_replicas_own_server_has_its_host_for_itself_unless_told(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = {"data_parallel_size": 4, "data_parallel_rank": 3}
    alone = for_endpoint(build_config(**settings), ServeOptions()).parallel
    assert (alone.local_replicas, alone.local_replica, alone.first_device, alone.ranks_here) == (1, 0, 0, 1)
    shared = for_endpoint(build_config(**settings, data_parallel_size_local=2), ServeOptions()).parallel
    assert (shared.local_replicas, shared.local_replica, shared.first_device, shared.ranks_here) == (2, 1, 1, 2)
    monkeypatch.setattr(devices, "cuda_device_count", lambda: 1)
    monkeypatch.setattr(devices, "torch_has_cuda", lambda: True)
    assert pick_device(RuntimeConfig(), alone) == "cuda", "a pod sees its own device only"
    with pytest.raises(ConfigError, match="data_parallel_size_local=2 is more than the 1 CUDA"):
        pick_device(RuntimeConfig(), shared)
    with pytest.raises(ConfigError, match="data_parallel_size_local says how many run here"):
        pick_device(RuntimeConfig(), build_config(**settings).parallel)  # a program's: its replicas are taken to be here
    monkeypatch.setattr(affinity.machine, "usable_cores", lambda: [(0,), (1,)])
    monkeypatch.setattr(affinity.machine, "quota", lambda: None)
    assert [rank.threads for rank in affinity.plan_here(1, alone)] == [2]
    assert [rank.cores for rank in affinity.plan_here(1, shared)] == [(1,)]


@pytest.mark.parametrize(
    ("settings", "flags", "word"),
    [
        ({}, {"data_parallel_external_lb": True}, "data_parallel_external_lb needs data_parallel_rank"),
        ({}, {"data_parallel_external_lb": True, "data_parallel_hybrid_lb": True}, "leave one out"),
        ({"data_parallel_size": 2, "data_parallel_rank": 1}, {"data_parallel_hybrid_lb": True}, "data_parallel_rank=1"),
        ({"data_parallel_size": 2, "data_parallel_start_rank": 1}, {"data_parallel_hybrid_lb": True}, "data_parallel_size_local"),
        (
            {"data_parallel_size": 2, "data_parallel_size_local": 2, "data_parallel_start_rank": 1},
            {"data_parallel_hybrid_lb": True},
            "0 to 1",
        ),
    ],
)
def test_endpoints_that_cannot_be(settings: dict[str, Any], flags: dict[str, bool], word: str) -> None:
    with pytest.raises(ConfigError, match=word):
        for_endpoint(build_config(**settings), ServeOptions(**flags))
