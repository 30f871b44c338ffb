"""Groups on NVIDIA GPUs: NCCL with one rank per device, and gloo where ranks share one."""

from __future__ import annotations

import pytest
import torch

from lockstep.testing.ranks import run_ranks

JOBS = "tests.distributed.cuda_jobs"
pytestmark = pytest.mark.cuda


def test_nccl_world_one_rank_per_device():
    count = torch.cuda.device_count()
    assert run_ranks(f"{JOBS}:world", count, backend="nccl", timeout=120) == ["passed"] * count


@pytest.mark.parametrize("world_size", [2, 3])
def test_ranks_share_one_gpu(world_size):
    assert run_ranks(f"{JOBS}:shared", world_size, timeout=120) == ["passed"] * world_size


def test_a_device_that_is_not_there_is_refused():
    run_ranks(f"{JOBS}:too_many", 1, init=False)
