"""Whole steps against a peer's grid, and whole servers against measured runs on H100."""

import pytest

from lockstep.planner import catalogue
from lockstep.planner.hardware import ZERO_CALIBRATION, make_cluster
from lockstep.planner.serving import LONGEST_TTFT_S, fit_serving
from lockstep.testing import planner_accuracy as accuracy
from lockstep.testing.planner_runs import VLLM_GROUPS, runs


@pytest.fixture(scope="module")
def cluster():
    h100 = catalogue.device_shipped("H100")
    return make_cluster(h100)


def test_static_grid(cluster):
    ttft, tpot, held_ttft, held_tpot = accuracy.grid_errors(cluster)
    assert (ttft.n, held_ttft.n) == (72, 36)
    assert max(ttft.mape, held_ttft.mape) <= 0.05
    assert max(tpot.mape, held_tpot.mape) <= 0.04


@pytest.mark.parametrize(("model", "weights"), VLLM_GROUPS)
def test_real_servers(cluster, model, weights):
    found = accuracy.deployment(model, weights, "vllm", cluster)
    assert found.runs - found.waited >= 15
    assert found.tpot_calibrated <= 0.08, found
    assert found.ttft_calibrated <= 0.10, found
    # uncalibrated, as every prediction says of itself
    assert found.tpot <= cluster.device.band.tpot, found
    assert found.ttft <= cluster.device.band.ttft, found


def test_runs_that_waited_for_memory_are_left_out_of_ttft_only(cluster):
    found = [run for group in VLLM_GROUPS for run in runs(*group, cluster)]
    waited = [run for run in found if run.ttft_s > LONGEST_TTFT_S]
    assert (len(found), len(waited)) == (135, 7)


def test_no_run_to_fit_to_is_said(cluster):
    waited = [run for run in runs(*VLLM_GROUPS[1], cluster) if run.ttft_s > LONGEST_TTFT_S]
    with pytest.raises(ValueError, match="none with a TTFT of 3 s or less"):
        fit_serving(waited)


def test_an_unmeasured_device_stays_in_its_band():
    found = accuracy.transferred(catalogue.device_shipped("H100"), catalogue.device_shipped("A100"))
    assert max(found.values()) <= ZERO_CALIBRATION.operation, found
