"""The demo runs both models for real, shows the split, and says so when they differ."""

import re
import subprocess
import sys

import pytest

from lockstep.cli import demo
from lockstep.cli.main import main


def test_the_demo_shows_the_split_and_compares():
    done = subprocess.run(
        [sys.executable, "-m", "lockstep", "demo", "--max-tokens", "12"], capture_output=True, text=True, timeout=170, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "TP=2 output identical to TP=1: yes" in done.stdout
    rows = re.findall(r"^ +(\d) +([\d,]+) +([\d,]+) +([\d.]+) MiB$", done.stdout, re.MULTILINE)
    assert [r[0] for r in rows] == ["0", "1"]
    # matrices are halved, norms are whole on both: a little more than half of 2 x 6.56 M float32 parameters together
    assert all(12_500_000 < int(r[1].replace(",", "")) < 13_500_000 for r in rows)
    assert len(re.findall(r"\d+ tokens/s over 3 prompts", done.stdout)) == 2


def test_a_difference_is_a_failure(monkeypatch, capsys):
    monkeypatch.setattr(demo, "_write", lambda tp, pp, params, show: ([[tp]], []))
    assert demo.run([]) == 1
    assert "TP=2 output identical to TP=1: NO" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("argv", "named"), [(["--max-tokens", "0"], "--max-tokens=0"), (["-tp", "0"], "--tensor-parallel-size=0"), (["--wat"], "--wat")]
)
def test_wrong_arguments_exit_2(argv, named, capsys):
    assert main(["demo", *argv]) == 2
    assert named in capsys.readouterr().err
