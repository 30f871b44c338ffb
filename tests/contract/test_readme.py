"""What the README tells people to type works as written (with a tiny model where it says MODEL, and small counts for benchmarks)."""

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from lockstep.testing.server import running_server
from lockstep.testing.tiny import make_tiny

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", TEXT, re.DOTALL)
LINES = [line.split("  #")[0].strip() for kind, block in BLOCKS if kind == "console" for line in block.splitlines() if line.strip()]
COMMANDS = [line for line in LINES if line.startswith("lockstep ")]
SMALL = {"throughput": ["--num-prompts", "2", "--repetitions", "1"], "latency": ["--output-len", "4", "--repetitions", "1"]}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return str(make_tiny("llama", tmp_path_factory.mktemp("readme") / "my-llama", seed=0))


def run(args: list[str]) -> subprocess.CompletedProcess:
    return subprocess.run(args, input="Hello\n/exit\n", capture_output=True, text=True, timeout=170, check=False, cwd=ROOT)


def test_there_is_something_to_run():
    assert len(COMMANDS) >= 6 and [kind for kind, _ in BLOCKS].count("python") >= 1


OF_A_SERVER = ("lockstep serve", "lockstep top", "lockstep bench serve")


def test_the_server_and_what_asks_it():
    """Started as written, but for its port; the others are pointed at it."""
    serve, top, bench = ([line for line in COMMANDS if line.startswith(verb)] for verb in OF_A_SERVER)
    assert len(serve) == len(top) == len(bench) == 1
    flags = shlex.split(serve[0])[2:]
    assert flags == ["-tp", "2"]
    with running_server("--no-cpu-binding", tp=2) as server:
        done = run([sys.executable, "-m", "lockstep", "top", server.url, "--once", *shlex.split(top[0])[2:]])
        assert done.returncode == 0 and "rank" in done.stdout, done.stderr
        words = [server.url if word.startswith("http://") else word for word in shlex.split(bench[0])[1:]]
        words[words.index("--num-prompts") + 1], words[words.index("--request-rate") + 1] = "4", "50"
        done = run([sys.executable, "-m", "lockstep", *words, "--random-output-len", "4", "--random-input-len", "8"])
        assert done.returncode == 0 and done.stdout, done.stderr
        assert server.stop() == 0


@pytest.mark.parametrize("line", [line for line in COMMANDS if not line.startswith(OF_A_SERVER)])
def test_a_command_runs(line, model, tmp_path):
    answers = tmp_path / "answers.jsonl"
    asked = {"custom_id": "one", "method": "POST", "url": "/v1/completions", "body": {"prompt": "def", "max_tokens": 2}}
    (tmp_path / "requests.jsonl").write_text(json.dumps(asked) + "\n")
    there = {"./my-llama": model, "MODEL": model, "requests.jsonl": str(tmp_path / "requests.jsonl"), "answers.jsonl": str(answers)}
    words = [there.get(w, w) for w in shlex.split(line)[1:]]
    words += SMALL.get(words[1], []) if words[0] == "bench" else []
    done = run([sys.executable, "-m", "lockstep", *words])
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout or answers.exists()


@pytest.mark.parametrize("code", [block for kind, block in BLOCKS if kind == "python"])
def test_python_runs(code):
    done = run([sys.executable, "-c", code])
    assert done.returncode == 0, done.stderr
    assert "def add(a, b):" in done.stdout


@pytest.mark.parametrize("line", [line for line in LINES if line.startswith("make ")])
def test_a_make_target_exists(line):
    target = line.split()[1]
    assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.MULTILINE)


def test_every_link_leads_somewhere():
    for link in re.findall(r"\]\(([^)#]+)\)", TEXT):
        assert (ROOT / link).exists(), link
