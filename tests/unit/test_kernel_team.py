"""The team of compute threads: they meet, fail, sleep, are replaced and forked, and nobody is left waiting."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lockstep.kernels.variants import usable
from tests.unit.kernel_variants import load_or_skip

SPIN_NS = 50_000


@pytest.fixture(scope="module")
def lib():
    return load_or_skip(usable()[0])


@pytest.fixture(autouse=True)
def restored(lib):
    """Nothing in this file may leave a team or a patience behind, nor miss a wake."""
    missed = lib.missed_wakes()
    lib.set_spin_ns(SPIN_NS)
    yield
    lib.team_set(1, 0, 0)
    lib.set_spin_ns(SPIN_NS)
    assert lib.missed_wakes() == missed


@pytest.mark.parametrize("spin_ns", [0, SPIN_NS])
@pytest.mark.parametrize("threads", range(1, 9))
def test_barriers_of_any_team(lib, threads, spin_ns):
    """On two cores, eight threads are over-subscribed."""
    lib.set_spin_ns(spin_ns)
    lib.team_set(threads, 0, 0)
    assert lib.team_size() == threads
    assert lib.selftest_barriers(200, 0) == 0
    assert lib.selftest_barriers(20, 2000) == 0


@pytest.mark.parametrize(("threads", "spin_ns", "pause"), [(2, 0, 0), (2, SPIN_NS, 0), (3, 0, 0), (2, 200, 20), (3, 1000, 20)])
def test_no_wake_is_missed_in_a_hundred_thousand_rounds(lib, threads, spin_ns, pause):
    """Patiences about as long as the wait make threads fall asleep while they are being woken."""
    lib.set_spin_ns(spin_ns)
    lib.team_set(threads, 0, 0)
    assert lib.selftest_barriers(100_000 if threads == 2 else 10_000, pause) == 0


@pytest.mark.parametrize("spin_ns", [0, 500, SPIN_NS])
def test_no_wake_is_missed_between_jobs(lib, spin_ns):
    lib.set_spin_ns(spin_ns)
    lib.team_set(3, 0, 0)
    counts, ids = np.zeros(3, np.int64), np.zeros(3, np.int64)
    for _ in range(3000):
        lib.selftest_shares(3, counts.ctypes.data, ids.ctypes.data)
    assert counts.tolist() == [3000] * 3 and ids.tolist() == [0, 1, 2]


def test_sleeping_threads_wake_and_cost_nothing(lib):
    lib.team_set(4, 0, 0)
    lib.selftest_barriers(10, 0)
    time.sleep(0.05)
    before = time.process_time()
    time.sleep(0.3)
    assert time.process_time() - before < 0.1, "idle threads spin"
    assert lib.selftest_barriers(10, 0) == 0


@settings(max_examples=60, derandomize=True)
@given(st.integers(1, 8), st.integers(0, 100))
def test_shares_cover_everything_once(lib, threads, n):
    if lib.team_size() != threads:
        lib.team_set(threads, 0, 0)
    counts, ids = np.zeros(n, np.int64), np.full(n, -1, np.int64)
    lib.selftest_shares(n, counts.ctypes.data, ids.ctypes.data)
    assert counts.tolist() == [1] * n and ids.tolist() == sorted(ids.tolist())
    if n:
        sizes = np.bincount(ids, minlength=threads)
        assert sizes.max() - sizes.min() <= 1


@pytest.mark.parametrize("threads", [1, 2, 3, 8])
@pytest.mark.parametrize("n", [0, 1, 7, 500])
def test_items_are_taken_once_and_the_quick_help_the_slow(lib, threads, n):
    lib.team_set(threads, 0, 0)
    counts, ids = np.zeros(n, np.int64), np.full(n, -1, np.int64)
    lib.selftest_takes(n, 200, 0, counts.ctypes.data, ids.ctypes.data)
    assert (counts == 200).all() and (n == 0 or 0 <= ids.min() <= ids.max() < threads)
    if n == 500 and threads > 1:
        lib.selftest_takes(n, 1, 20_000, counts.ctypes.data, ids.ctypes.data)
        assert (counts == 201).all() and 0 < (ids == 0).sum() <= n // threads, "nobody helped the slow one"


@pytest.mark.parametrize("spin_ns", [0, SPIN_NS])
@pytest.mark.parametrize("threads", [1, 2, 3, 8])
def test_an_error_comes_out_once_and_the_team_lives(lib, threads, spin_ns):
    lib.set_spin_ns(spin_ns)
    lib.team_set(threads, 0, 0)
    for thread in range(threads):
        for at in (0, 1, 7):
            with pytest.raises(RuntimeError, match=f"^thread {thread} at {at}$"):
                lib.selftest_throw(thread, at, 8, False)
            assert lib.selftest_throw(-2, 0, 8, False) == threads
            assert lib.selftest_barriers(5, 0) == 0


def test_errors_at_random_moments(lib):
    """Late and early throwers, with others asleep, spinning, or just arriving."""
    rng = np.random.default_rng(1)
    for round_ in range(600):
        if round_ % 100 == 0:
            lib.set_spin_ns(int(rng.choice([0, 300, SPIN_NS])))
            lib.team_set(int(rng.integers(2, 5)), 0, 0)
        thread, at = int(rng.integers(lib.team_size())), int(rng.integers(5))
        with pytest.raises(RuntimeError, match=f"^thread {thread} at {at}$"):
            lib.selftest_throw(thread, at, 5, False)
    assert lib.selftest_barriers(100, 0) == 0


def test_when_all_throw_one_is_told(lib):
    lib.team_set(4, 0, 0)
    for _ in range(50):
        with pytest.raises(RuntimeError, match=r"^thread [0-3] at 0$"):
            lib.selftest_throw(-1, 0, 3, False)


def test_the_kind_of_error_survives(lib):
    lib.team_set(2, 0, 0)
    with pytest.raises(ValueError, match="thread 1 at 2"):
        lib.selftest_throw(1, 2, 3, True)


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("reshape", [False, True])
def test_a_job_starts_no_job(lib, threads, reshape):
    lib.team_set(threads, 0, 0)
    with pytest.raises(RuntimeError, match="may neither start another one nor reshape"):
        lib.selftest_nested(reshape)
    assert lib.team_size() == threads and lib.selftest_barriers(5, 0) == 0


def test_set_again_and_again(lib):
    def threads_now() -> int:
        return len(os.listdir("/proc/self/task")) if os.path.isdir("/proc/self/task") else 0

    lib.team_set(1, 0, 0)
    alone = threads_now()
    for i in range(60):
        lib.team_set(1 + i % 5, 0, 0)
        if i % 3:
            assert lib.selftest_barriers(3, 0) == 0
    lib.team_set(1, 0, 0)
    assert threads_now() in (0, alone), "a replaced team's threads are still there"


@pytest.mark.parametrize("threads", [0, -1, 5000])
def test_impossible_sizes_are_refused(lib, threads):
    lib.team_set(2, 0, 0)
    with pytest.raises(ValueError, match=f"1 to 4096 threads, not {threads}"):
        lib.team_set(threads, 0, 0)
    assert lib.team_size() == 2 and lib.selftest_barriers(5, 0) == 0


def test_a_core_that_is_not_there_does_no_harm(lib):
    cores = np.array([0, 4000, -1], np.int32)
    lib.team_set(3, cores.ctypes.data, 3)
    assert lib.selftest_barriers(50, 0) == 0


def test_two_callers_take_turns(lib):
    """Engines of one process in threads of their own, one of which even replaces the team."""
    lib.team_set(2, 0, 0)
    wrong = []

    def call(seed: int) -> None:
        for i in range(100):
            wrong.append(lib.selftest_barriers(3, 0))
            if seed == 2 and i % 10 == 0:
                lib.team_set(1 + i % 3, 0, 0)

    callers = [threading.Thread(target=call, args=(seed,)) for seed in range(3)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join(timeout=60)
    assert not any(c.is_alive() for c in callers) and wrong == [0] * 300


CHILD = """
import faulthandler, os, sys
faulthandler.dump_traceback_later(50, exit=True)
from pathlib import Path
from lockstep.kernels import library
lib = library.load(Path(sys.argv[1]))
lib.team_set(3, 0, 0)
assert lib.selftest_barriers(5, 0) == 0
"""


def child(lib, code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", CHILD + code, lib.__file__], capture_output=True, text=True, timeout=60)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_forked_child_works_alone(lib):
    """It has none of its parent's threads: it must not wait for them."""
    done = child(
        lib,
        """
import signal
pid = os.fork()
if not pid:
    signal.alarm(20)  # ends it even where it hangs in C++, holding the pipes
ok = lib.selftest_barriers(5, 0) == 0 and lib.team_size() == (3 if pid else 1)
if not pid:
    lib.team_set(2, 0, 0)
    os._exit(0 if ok and lib.selftest_barriers(5, 0) == 0 else 1)
assert os.waitpid(pid, 0)[1] == 0 and ok
print("both")
""",
    )
    assert (done.returncode, done.stdout) == (0, "both\n"), done.stderr


def test_a_process_ends_while_a_job_runs(lib):
    """A daemon thread's job must not keep the process from ending, nor crash it."""
    done = child(
        lib,
        """
import threading, time
threading.Thread(target=lib.selftest_barriers, args=(10**9, 0), daemon=True).start()
time.sleep(0.2)
print("bye", flush=True)
""",
    )
    assert (done.returncode, done.stdout) == (0, "bye\n"), done.stderr


@pytest.mark.skipif(sys.platform != "linux", reason="limits threads as Linux does")
def test_no_more_threads_to_be_had_is_an_error(lib):
    """Stacks need address space: without any left, threads cannot start. Those that did are ended."""
    done = child(
        lib,
        """
import resource
size = int(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmSize"))) * 1024
resource.setrlimit(resource.RLIMIT_AS, (size + (100 << 20), size + (100 << 20)))
try:
    lib.team_set(4000, 0, 0)
except RuntimeError as error:
    assert "could not start 4000 threads" in str(error), error
    assert lib.team_size() == 1 and lib.selftest_barriers(5, 0) == 0
    lib.team_set(2, 0, 0)
    assert lib.selftest_barriers(5, 0) == 0
    print("refused")
""",
    )
    assert (done.returncode, done.stdout) == (0, "refused\n"), done.stderr


def test_a_signal_while_asleep_changes_nothing(lib):
    """A handled signal interrupts a sleep, not the wait."""
    lib.set_spin_ns(0)
    lib.team_set(3, 0, 0)
    seen = []
    before = signal.signal(signal.SIGALRM, lambda *_: seen.append(1))
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.002, 0.002)
        for _ in range(30):
            assert lib.selftest_barriers(300, 0) == 0
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert seen


@pytest.mark.parametrize(("dtype", "code"), [(torch.bfloat16, 1), (torch.float16, 2)], ids=str)
@pytest.mark.parametrize("variant", usable(), ids=lambda v: v.name)
def test_numbers_are_rounded_as_torch_rounds(variant, dtype, code):
    """Every bfloat16 or float16, those halfway between two, their neighbours, and random bits."""
    lib = load_or_skip(variant)
    every = torch.arange(1 << 16).to(torch.int32).to(torch.int16).view(dtype).float()
    bits = every.view(torch.int32)
    halfway = (1 << 15) if dtype == torch.bfloat16 else (1 << 12)
    random = torch.randint(-(2**31), 2**31 - 1, (1 << 16,), generator=torch.Generator().manual_seed(1)).to(torch.int32)
    x = torch.cat([bits, bits + halfway - 1, bits + halfway, bits + halfway + 1, random]).view(torch.float32)
    out, again = torch.empty(len(x), dtype=dtype), torch.empty(len(x))
    lib.selftest_convert(x.data_ptr(), len(x), code, out.data_ptr(), again.data_ptr())
    wanted = x.to(dtype)
    # The instruction for bfloat16 makes numbers below the smallest normal one zero.
    same = (out == wanted) | (out.isnan() & wanted.isnan()) | ((out == 0) & (x.abs() < torch.finfo(dtype).tiny))
    assert same.all(), x[~same][:5]
    if dtype == torch.float16 or "bf16" not in variant.name:
        assert torch.equal(out[~wanted.isnan()], wanted[~wanted.isnan()])
    assert torch.equal(out.float()[~wanted.isnan()], again[~wanted.isnan()]) and again[wanted.isnan()].isnan().all()


@pytest.mark.parametrize("variant", usable(), ids=lambda v: v.name)
def test_exponentials_are_accurate_everywhere(variant):
    lib = load_or_skip(variant)
    ends = [-1e30, -104.5, 88.8, -torch.inf, -104.0, 89.0, torch.inf, torch.nan, 0.0, -0.0, 1e-30]
    x = torch.cat([torch.linspace(-103, 88.7, 100_003), torch.tensor(ends)])
    out, tanhs = torch.empty_like(x), torch.empty_like(x)
    lib.selftest_exp(x.data_ptr(), len(x), out.data_ptr(), tanhs.data_ptr())
    exact = x.double().exp()
    ordinary = exact.float().isfinite() & (exact > torch.finfo(torch.float32).tiny)
    assert ((out.double() - exact).abs()[ordinary] <= 2e-7 * exact[ordinary]).all()
    assert out[-9].isinf(), "beyond what float32 holds"
    small = ~ordinary & (exact < 1)  # in units of the last place there
    assert ((out.double() - exact).abs()[small] <= 2.0**-149).all() and (out[-11:-9] == 0).all() and out[-6:-4].isinf().all()
    assert out[-8] == 0 and out[-4].isnan() and torch.equal(out[-3:], torch.ones(3))
    assert ((tanhs.double() - x.double().tanh()).abs()[:-4] <= 3e-7 * x.double().tanh().abs()[:-4]).all() and tanhs[-4].isnan()
