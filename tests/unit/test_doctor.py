"""doctor tells what is there, and fails when something is broken."""

import subprocess
import sys

import pytest

from lockstep.cli import doctor, doctor_cpu
from lockstep.executor.affinity import plan_cores
from lockstep.kernels import amx, build
from lockstep.kernels.library import choose


def test_two_ranks_meet_and_every_line_has_a_mark():
    done = subprocess.run(
        [sys.executable, "-m", "lockstep", "doctor", "--world-size", "2"], capture_output=True, text=True, timeout=170, check=False
    )
    lines = done.stdout.splitlines()
    assert done.returncode == 0, done.stdout + done.stderr
    assert all(line[:4].strip() in ("ok", "warn") for line in lines)
    assert "2 ranks met in" in lines[-1] and "all-reduce of 8 KiB" in lines[-1]


@pytest.mark.parametrize("flag", ["-tp", "--tensor-parallel-size"])
def test_the_plan_of_threads_is_a_line_for_each_rank(flag, monkeypatch, capsys):
    monkeypatch.setattr(doctor, "_ranks", lambda world: iter([("ok", "ranks", "not tried")]))
    monkeypatch.setattr(doctor_cpu, "plan_here", lambda ranks, parallel: plan_cores([(0, 3), (1, 4), (2, 5)], ranks))
    assert doctor.run([flag, "2"]) == 0
    said = capsys.readouterr().out
    assert "ok    rank 0 of 2     2 threads  on CPUs 0-1 (kept on 0-1,3-4)\n" in said
    assert "ok    rank 1 of 2     1 thread   on CPU 2 (kept on 2,5)\n" in said
    assert doctor.run([flag, "7"]) == 0
    assert "rank 6 of 7     1 thread  not bound: 7 ranks on 6 CPUs; waits hand the CPU on, then sleep\n" in capsys.readouterr().out


@pytest.fixture
def no_library(monkeypatch, tmp_path):
    """Nothing is shipped and nothing was built."""
    monkeypatch.setattr(build, "SHIPPED", tmp_path / "shipped")
    monkeypatch.setenv("LOCKSTEP_CACHE", str(tmp_path / "cache"))
    return tmp_path


def found(check):
    return {subject: (mark, text) for mark, subject, text in check()}


def test_where_the_kernel_library_comes_from(no_library, monkeypatch):
    monkeypatch.setenv("LOCKSTEP_KERNELS", "generic")
    lines = found(doctor_cpu.kernels)
    assert lines["kernels"][0] == "ok" and lines["kernels"][1].startswith("generic, as LOCKSTEP_KERNELS says; this CPU can run ")
    assert lines["library"][0] == "ok" and str(no_library / "cache") in lines["library"][1]
    loaded = []
    monkeypatch.setattr(doctor_cpu, "load", loaded.append)
    name = build.file_name(choose())
    for folder, words in (("cache/kernels", f"built before, in {no_library / 'cache' / 'kernels'}"), ("shipped", "shipped with lockstep")):
        (no_library / folder).mkdir(exist_ok=True, parents=True)
        (no_library / folder / name).write_text("")
        assert found(doctor_cpu.kernels)["library"] == ("ok", f"{name}, {words}")
        assert loaded.pop() == no_library / folder / name


def test_a_library_that_cannot_be_loaded_fails(no_library, monkeypatch):
    (no_library / "shipped").mkdir()
    (no_library / "shipped" / build.file_name(choose())).write_text("not a library")
    marks = [mark for mark, *_ in doctor._guarded("kernels", doctor_cpu.kernels)]
    assert marks[-1] == "fail"


def test_without_a_compiler_or_a_library_plain_torch_is_said_to_run(no_library, monkeypatch):
    def none():
        raise build.BuildError("no C++ compiler was found")

    monkeypatch.setattr(build, "compiler", none)
    lines = found(doctor_cpu.kernels)
    assert lines["library"] == ("warn", "cannot be built, so plain torch operations run, slower: no C++ compiler was found")
    assert lines["c++ compiler"][0] == "ok"
    monkeypatch.setenv("LOCKSTEP_KERNELS", "torch")
    assert [mark for mark, *_ in doctor_cpu.kernels()] == ["warn"]


@pytest.mark.parametrize(("refused", "mark"), [("", "ok"), ("the system refuses AMX tiles to this process", "warn")])
def test_the_permission_for_amx_is_told(refused, mark, monkeypatch):
    monkeypatch.setattr(doctor_cpu, "cpu_flags", lambda: frozenset({"amx_tile"}))
    monkeypatch.setattr(amx, "refusal", lambda: refused)
    assert found(doctor_cpu.kernels)["amx"] == (mark, refused or "this process may use its tiles")


def test_huge_pages(monkeypatch, tmp_path):
    monkeypatch.setattr(doctor_cpu, "HUGE_PAGES", tmp_path)
    assert [mark for mark, *_ in doctor_cpu.huge_pages()] == ["ok", "ok"]
    for setting, mark in (("always [madvise] never", "ok"), ("always madvise [never]", "warn")):
        (tmp_path / "enabled").write_text(setting + "\n")
        (tmp_path / "shmem_enabled").write_text("always within_size advise [never] deny force\n")
        lines = list(doctor_cpu.huge_pages())
        assert lines[0][0] == mark and lines[1] == ("ok", "huge pages", "memory shared by ranks: never")
    assert lines[0][2].endswith(f"as root: echo madvise > {tmp_path / 'enabled'}")


def test_a_check_that_breaks_fails_the_command(monkeypatch, capsys):
    def broken():
        raise OSError("the disk is gone")
        yield

    monkeypatch.setattr(doctor, "_memory", broken)
    monkeypatch.setattr(doctor, "_ranks", lambda world: iter([("ok", "ranks", "not tried")]))
    assert doctor.run([]) == 1
    assert "fail  memory          OSError: the disk is gone" in capsys.readouterr().out


def test_ranks_that_cannot_run_are_a_failure_with_the_reason(monkeypatch):
    monkeypatch.setattr(doctor, "PAIR", "raise SystemExit('rank broke')")
    assert [(mark, "rank broke" in found) for mark, _, found in doctor._ranks(2)] == [("fail", True)]


@pytest.mark.parametrize("argv", [["--world-size", "0"], ["--world-size"], ["--wat"]])
def test_wrong_arguments_exit_2(argv):
    with pytest.raises(SystemExit) as stop:
        doctor.run(argv)
    assert stop.value.code == 2
