"""The class that torch makes gloo groups of, while lockstep's share one event loop: for everybody else nothing changes."""

from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
import torch.distributed.distributed_c10d as c10d

from lockstep.distributed import default_group, process_groups
from lockstep.distributed.process_groups import forget_devices, one_event_loop


@pytest.fixture(autouse=True)
def _no_devices_left():
    yield
    forget_devices()
    assert not process_groups._DEVICES


def test_groups_that_others_make_meanwhile_are_made_as_they_ask():
    options = dist.ProcessGroupGloo._Options()
    options._devices = [dist.ProcessGroupGloo.create_default_device()]
    options._timeout = timedelta(seconds=7)
    with one_event_loop():
        store = dist.HashStore()
        by_default = c10d.ProcessGroupGloo(dist.PrefixStore("a", store), 0, 1)
        by_place = c10d.ProcessGroupGloo(dist.PrefixStore("b", store), 0, 1, timedelta(seconds=5))
        by_name = c10d.ProcessGroupGloo(dist.PrefixStore("c", store), 0, 1, timeout=timedelta(seconds=5))
        assert process_groups._DEVICES
        forget_devices()
        with_options = c10d.ProcessGroupGloo(dist.PrefixStore("d", store), 0, 1, options)
        assert not process_groups._DEVICES  # it has its own
    for group in (by_default, by_place, by_name, with_options):
        x = torch.ones(3)
        group.allreduce([x]).wait()
        assert torch.equal(x, torch.ones(3))


def test_what_was_there_comes_back_when_the_last_leaves():
    class Theirs(dist.ProcessGroupGloo):
        pass

    torchs = c10d.ProcessGroupGloo
    c10d.ProcessGroupGloo = Theirs
    try:
        first, second = one_event_loop(), one_event_loop()
        first.__enter__()
        second.__enter__()
        first.__exit__(None, None, None)  # in the order of two threads
        assert c10d.ProcessGroupGloo not in (Theirs, torchs)
        second.__exit__(None, None, None)
        assert c10d.ProcessGroupGloo is Theirs
    finally:
        c10d.ProcessGroupGloo = torchs


def test_a_default_group_that_fails_leaves_no_event_loop():
    with pytest.raises(RuntimeError):
        default_group.create(dist.HashStore(), 0, 2, "gloo", torch.device("cpu"), 1.0)
    assert not process_groups._DEVICES and not dist.is_initialized()
