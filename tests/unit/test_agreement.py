"""Ranks that would compute with different kernels do not start."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lockstep.config.errors import ConfigError
from lockstep.kernels.library import library
from lockstep.worker import agreement
from lockstep.worker.agreement import check_kernels


def world(change: Any = lambda row: row) -> Any:
    """A group of three whose rank 1 says `change` of what this rank says."""

    def all_gather(mine: torch.Tensor, dim: int) -> torch.Tensor:
        assert dim == 0 and mine.shape == (1, 2)
        return torch.cat([mine, change(mine.clone()), mine])

    return SimpleNamespace(world_size=3, all_gather=all_gather)


def other_variant(row: torch.Tensor) -> torch.Tensor:
    row[0, 0] = agreement._NAMES.index("avx2") if row[0, 0] != agreement._NAMES.index("avx2") else agreement._NAMES.index("generic")
    return row


@pytest.mark.parametrize("native", [True, False])
def test_alike_is_fine(native: bool) -> None:
    check_kernels(world(), native)


@pytest.mark.skipif(library() is None, reason="needs the kernels")
def test_another_variant_is_refused_by_name() -> None:
    name = library().variant()  # type: ignore[union-attr]
    with pytest.raises(ConfigError, match=rf"different CPU kernels.*{name} on ranks 0, 2.*LOCKSTEP_KERNELS"):
        check_kernels(world(other_variant), native=True)


@pytest.mark.skipif(library() is None, reason="needs the kernels")
def test_a_rank_without_kernels_is_refused() -> None:
    with pytest.raises(ConfigError, match="torch on rank 1"):
        check_kernels(world(torch.zeros_like), native=True)


@pytest.mark.skipif(library() is None, reason="needs the kernels")
def test_another_version_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"different versions of the CPU kernels.*install the same lockstep"):
        check_kernels(world(lambda row: row + torch.tensor([0, 1])), native=True)


def test_one_rank_asks_nobody() -> None:
    check_kernels(SimpleNamespace(world_size=1), native=True)  # type: ignore[arg-type]
