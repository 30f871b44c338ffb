"""Where a launcher put this process, read from its environment; and what is said when that cannot be."""

from __future__ import annotations

import pytest

from lockstep.config.build import build_config
from lockstep.config.errors import ConfigError
from lockstep.config.launcher import Place, place, ranks_here
from lockstep.config.tree import ParallelConfig
from lockstep.config.validate import resolve

TORCHRUN = {
    "RANK": "5", "LOCAL_RANK": "1", "WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "4", "MASTER_ADDR": "localhost", "MASTER_PORT": "29500",
}  # fmt: skip
EIGHT = {"tensor_parallel_size": 2, "pipeline_parallel_size": 2, "data_parallel_size": 2}


def parallel(**sizes: int) -> ParallelConfig:
    return ParallelConfig(distributed_executor_backend="external_launcher", **sizes)


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    for name, value in TORCHRUN.items():
        monkeypatch.setenv(name, value)
    return monkeypatch


def test_replicas_are_runs_of_ranks(environment: pytest.MonkeyPatch) -> None:
    assert place(parallel(**EIGHT)) == Place(rank=5, local_rank=1, world_size=8, local_world_size=4, replica=1)
    for rank in range(8):
        environment.setenv("RANK", str(rank))
        assert place(parallel(tensor_parallel_size=2, data_parallel_size=4)).replica == rank // 2
    assert ranks_here(parallel(**EIGHT)) == 4
    assert ranks_here(ParallelConfig(tensor_parallel_size=3)) == 3


def test_the_resolved_configuration_knows_its_replica(environment: pytest.MonkeyPatch) -> None:
    settings = {"distributed_executor_backend": "external_launcher", **EIGHT}
    config, _, _ = resolve(build_config(**settings, max_model_len=64))
    assert config.parallel.data_parallel_rank == 1
    again, _, _ = resolve(config)
    assert again == config


def test_without_a_number_of_local_ranks_all_are_here(environment: pytest.MonkeyPatch) -> None:
    environment.delenv("LOCAL_WORLD_SIZE")
    assert place(parallel(**EIGHT)).local_world_size == 8


@pytest.mark.parametrize("name", [n for n in TORCHRUN if n != "LOCAL_WORLD_SIZE"])
def test_a_missing_variable_is_named_with_the_command(name: str, environment: pytest.MonkeyPatch) -> None:
    environment.delenv(name)
    with pytest.raises(ConfigError, match=rf"{name} is not in the environment: start it with torchrun --nproc-per-node=8"):
        place(parallel(**EIGHT))


@pytest.mark.parametrize(
    ("changes", "sizes", "words"),
    [
        ({}, {"tensor_parallel_size": 2}, ["WORLD_SIZE=8", "tensor_parallel_size=2", "are 2 ranks", "torchrun --nproc-per-node=2"]),
        ({"RANK": "8"}, EIGHT, ["RANK=8", "WORLD_SIZE=8"]),
        ({"LOCAL_RANK": "4"}, EIGHT, ["LOCAL_RANK=4", "LOCAL_WORLD_SIZE=4"]),
        ({"RANK": "x"}, EIGHT, ["RANK='x'", "not a whole number"]),
        ({"RANK": "-1"}, EIGHT, ["RANK='-1'", "not a whole number"]),
        ({}, {**EIGHT, "data_parallel_rank": 0}, ["data_parallel_rank=0", "RANK=5 is of replica 1", "leave it out"]),
    ],
)
def test_what_does_not_fit_is_refused(
    changes: dict[str, str], sizes: dict[str, int], words: list[str], environment: pytest.MonkeyPatch
) -> None:
    for name, value in changes.items():
        environment.setenv(name, value)
    with pytest.raises(ConfigError) as caught:
        place(parallel(**sizes))
    assert all(word in str(caught.value) for word in words), caught.value
