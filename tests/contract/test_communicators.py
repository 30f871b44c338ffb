"""Every communicator keeps the contract of communicators/base.py."""

from __future__ import annotations

import inspect

import pytest
import torch

from lockstep.distributed.communicators.base import Communicator
from lockstep.testing.ranks import run_ranks
from tests.contract.communicator_jobs import CHECKS

JOB = "tests.contract.communicator_jobs:run"


@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize(
    ("kind", "world_size"),
    [("loopback", 1), ("gloo", 1), ("gloo", 2), ("gloo", 3), ("staged", 2), ("shm", 2), ("shm", 3), ("shm-small", 2), ("shm-small", 5)]
    + [("hierarchical:ab", 2), ("hierarchical:aab", 3), ("hierarchical:abbaa", 5)]
    + [pytest.param("shm", n, marks=pytest.mark.full) for n in (4, 6, 7, 8)]  # of a group of one nobody makes one
    + [pytest.param("shm-small", n, marks=pytest.mark.full) for n in (1, 4, 6, 7, 8)]
    + [pytest.param(f"hierarchical:{h}", len(h), marks=pytest.mark.full) for h in ("a", "aabb", "aaabbc", "abcabca", "aaaabbbb")]
    + [pytest.param("gloo", n, marks=pytest.mark.full) for n in (4, 5, 6, 7, 8)]
    + [pytest.param("staged-cuda", n, marks=pytest.mark.cuda) for n in (1, 2, 3)],
)
def test_contract(kind, world_size, check):
    assert run_ranks(JOB, world_size, kind, check) == ["passed"] * world_size


@pytest.mark.cuda
@pytest.mark.parametrize("check", CHECKS)
def test_contract_nccl(check):
    count = torch.cuda.device_count()
    assert run_ranks("tests.contract.communicator_jobs:run_nccl", count, check, backend="nccl") == ["passed"] * count


def test_the_suite_covers_the_interface():
    """A method that joins the contract must join the suite."""
    methods = {name for name, _ in inspect.getmembers(Communicator, inspect.isfunction) if not name.startswith("_")}
    checked = {name.rstrip("_") for name in CHECKS} | {"send", "recv", "isend", "irecv", "close"}
    assert {name.rstrip("_") for name in methods} == checked - {"send_recv"}
