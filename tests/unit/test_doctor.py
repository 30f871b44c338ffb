"""doctor tells what is there, and fails when something is broken."""

import subprocess
import sys

import pytest

from lockstep.cli import doctor


def test_two_ranks_meet_and_every_line_has_a_mark():
    done = subprocess.run(
        [sys.executable, "-m", "lockstep", "doctor", "--world-size", "2"], capture_output=True, text=True, timeout=170, check=False
    )
    lines = done.stdout.splitlines()
    assert done.returncode == 0, done.stdout + done.stderr
    assert all(line[:4].strip() in ("ok", "warn") for line in lines)
    assert "2 ranks met in" in lines[-1] and "all-reduce of 8 KiB" in lines[-1]


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
