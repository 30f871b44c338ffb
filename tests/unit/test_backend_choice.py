"""Which executor is automatic, from what is known of the machine; and what changes where Ray decides where ranks run."""

from __future__ import annotations

import logging
import sys
from types import SimpleNamespace

import pytest

from lockstep.cli.flags import parse
from lockstep.config import devices, validate
from lockstep.config.build import build_config
from lockstep.config.defaults import choose_backend, default_backend
from lockstep.config.errors import ConfigError
from lockstep.config.serve import ServeOptions
from lockstep.config.tree import ParallelConfig
from lockstep.config.validate import resolve
from lockstep.executor.ray import fitting

FOUR = ParallelConfig(tensor_parallel_size=4)


@pytest.mark.parametrize(
    ("parallel", "devices_here", "in_group", "cluster", "wanted", "why"),
    [
        (ParallelConfig(), 1, True, True, "uni", "one rank"),
        (FOUR, 4, False, False, "mp", "4 ranks"),
        (FOUR, 4, False, True, "mp", "4 ranks"),
        (FOUR, 2, False, False, "mp", "4 ranks"),
        (FOUR, 2, False, True, "ray", "4 ranks are more than the 2 devices here, and RAY_ADDRESS names a cluster"),
        (FOUR, 8, True, False, "ray", "in a Ray placement group"),
        (ParallelConfig(tensor_parallel_size=2, data_parallel_size=2), 3, False, True, "ray", "4 ranks are more than the 3"),
        (ParallelConfig(tensor_parallel_size=4, nnodes=2), 1, True, True, "mp", "4 ranks"),
        (ParallelConfig(tensor_parallel_size=4, distributed_executor_backend="mp"), 1, True, True, "mp", "it is set"),
    ],
)
def test_the_choice_and_its_reason(
    parallel: ParallelConfig, devices_here: int, in_group: bool, cluster: bool, wanted: str, why: str
) -> None:
    choice = choose_backend(parallel, devices_here, in_group, cluster)
    assert choice.value == wanted and why in choice.why


def test_without_knowledge_it_is_the_number_of_ranks() -> None:
    assert [default_backend(p) for p in (ParallelConfig(), FOUR)] == ["uni", "mp"]


def test_the_resolved_configuration_has_it_and_says_why(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    monkeypatch.setattr(validate, "usable_cpus", lambda: 1)
    with caplog.at_level(logging.INFO, logger="lockstep.config"):
        config, _, _ = resolve(build_config(tensor_parallel_size=2, device="cpu"))
    assert config.parallel.distributed_executor_backend == "ray"
    assert "distributed_executor_backend is ray: 2 ranks are more than the 1 devices here" in caplog.text
    (seen,) = [r for r in caplog.records if r.levelno >= logging.WARNING]  # no other: the cores here are not the ranks' cores
    assert "distributed_executor_backend is ray" in seen.message, "nobody asked for it by name, so it is told"
    for address in ("", "local", "ray://10.0.0.1:10001"):
        monkeypatch.setenv("RAY_ADDRESS", address)
        assert resolve(build_config(tensor_parallel_size=2, device="cpu"))[0].parallel.distributed_executor_backend == "mp"


def test_auto_is_the_default_by_its_name(caplog: pytest.LogCaptureFixture) -> None:
    assert build_config(distributed_executor_backend="auto") == build_config()
    with caplog.at_level(logging.WARNING, logger="lockstep.config"):
        assert resolve(build_config(distributed_executor_backend="auto", device="cpu"))[0].parallel.distributed_executor_backend == "uni"
    assert not caplog.records, "the obvious one needs no word"
    parsed = parse("serve", ["--distributed-executor-backend", "auto"], ServeOptions, max_tokens=None, description="", sampling=False)
    assert parsed.config.parallel.distributed_executor_backend is None


def test_in_a_placement_group_without_importing_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    group = SimpleNamespace(get_current_placement_group=lambda: "a group")
    monkeypatch.setattr(validate.launcher, "has_ray", lambda: True)
    monkeypatch.setitem(sys.modules, "ray", SimpleNamespace(is_initialized=lambda: True, util=group))
    assert resolve(build_config(tensor_parallel_size=2, device="cpu"))[0].parallel.distributed_executor_backend == "ray"


def test_without_ray_it_is_not_chosen_and_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(validate.launcher, "has_ray", lambda: False)
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    monkeypatch.setattr(validate, "usable_cpus", lambda: 1)
    assert resolve(build_config(tensor_parallel_size=2, device="cpu"))[0].parallel.distributed_executor_backend == "mp"
    with pytest.raises(ConfigError, match=r"distributed_executor_backend='ray' needs Ray.*pip install 'lockstep\[ray\]'"):
        resolve(build_config(distributed_executor_backend="ray"))


def test_the_devices_of_this_host_do_not_limit_a_cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "cuda_device_count", lambda: 0)
    config, _, _ = resolve(build_config(distributed_executor_backend="ray", tensor_parallel_size=2, device="cuda"))
    assert config.runtime.device == "cuda"
    huge = build_config(distributed_executor_backend="ray", tensor_parallel_size=2, device="cpu", kv_cache_memory_bytes=1 << 50)
    assert resolve(huge)[0].cache.kv_cache_memory_bytes == 1 << 50


def test_bundles_of_an_existing_group() -> None:
    assert fitting([{"CPU": 1.0}, {"GPU": 2.0}, {"CPU": 1.0, "GPU": 2.0}], {"GPU": 2.0}, 2) == [1, 2]
    with pytest.raises(ConfigError, match="whose bundles have 1 GPU, 1 GPU, and 1 of at least 2 GPU are needed"):
        fitting([{"GPU": 1.0}, {"GPU": 1.0}], {"GPU": 2.0}, 1)
