"""Benchmark workloads are the same everywhere, and repetitions never meet a warm prefix cache."""

import pytest

from lockstep.cli.bench import machine, workload
from lockstep.cli.bench.throughput import ThroughputArgs


def test_the_mixed_workload_is_seeded_and_in_range():
    a, b = workload.mixed(32000), workload.mixed(32000)
    assert a == b and len(a.prompts) == 64
    assert all(32 <= len(p) <= 512 for p in a.prompts) and all(16 <= n <= 256 for n in a.output_lens)
    assert a.input_tokens == sum(map(len, a.prompts)) and a.output_tokens == sum(a.output_lens)


def test_a_shifted_workload_has_the_same_lengths_and_other_tokens():
    work = workload.mixed(4096)
    moved = work.shifted(1, 4096)
    assert [len(p) for p in moved.prompts] == [len(p) for p in work.prompts]
    assert all(a[:16] != b[:16] for a, b in zip(work.prompts, moved.prompts, strict=True))
    assert all(100 <= t < 4096 for p in work.shifted(5000, 4096).prompts for t in p)


def test_a_short_model_gets_a_workload_that_fits():
    work = workload.mixed(300, max_model_len=128)
    assert all(len(p) + n <= 128 for p, n in zip(work.prompts, work.output_lens, strict=True))


@pytest.mark.parametrize("name", ["num_prompts", "repetitions", "peer_batch_size", "input_len", "output_len"])
def test_a_count_below_one_is_refused_by_its_flag(name):
    with pytest.raises(ValueError, match=f"--{name.replace('_', '-')}=0"):
        ThroughputArgs(**{name: 0}).workload(1000, 768)


def test_the_machine_is_described_and_its_bandwidth_measured():
    found = machine.describe()
    assert found["cores"] >= 1 and found["torch"] and found["commit"]
    assert machine.read_bandwidth_gbps(1, mib=64, repeats=1) > 0.1
    assert machine.peak_rss_mib() > 1
