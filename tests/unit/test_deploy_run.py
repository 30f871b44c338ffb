"""Launch scripts, examples and the Dockerfile: run as far as they can be without a second host, Ray or Docker."""

from __future__ import annotations

import ast
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
MULTI_NODE, RUN_CLUSTER = ROOT / "examples" / "multi_node.sh", ROOT / "deploy" / "run_cluster.sh"
DOCKERFILE = ROOT / "deploy" / "Dockerfile"


@pytest.fixture
def tools(tmp_path: Path) -> Path:
    """A folder of stand-ins for `lockstep` and `docker` that write down what they were given, one argument a line."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for tool in ("bash", "cat", "mktemp", "rm", "sleep"):
        (folder / tool).symlink_to(shutil.which(tool) or "")
    stand_in(folder, "lockstep", 'printf "%s\\n" "$@" >"$SAID"')
    stand_in(
        folder,
        "docker",
        'printf "%s\\n" "$@" >>"$SAID"; [[ $1 != run ]] || { echo c0ffee >"$5.new"; mv "$5.new" "$5"; exec sleep "${SLEEP:-0}"; }',
    )
    (folder / "mv").symlink_to(shutil.which("mv") or "")
    return folder


def stand_in(folder: Path, name: str, line: str) -> None:
    (folder / name).write_text(f"#!{shutil.which('bash')}\n{line}\n")
    (folder / name).chmod(0o755)


def environment(tools: Path, **variables: str) -> dict[str, str]:
    return {"PATH": str(tools), "SAID": str(tools.parent / "said"), "TMPDIR": str(tools.parent), **variables}


def run(script: Path, *args: str, tools: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([script, *args], env=environment(tools, **variables), capture_output=True, text=True, timeout=60)


def said(tools: Path) -> list[str]:
    return (tools.parent / "said").read_text().splitlines()


@pytest.mark.parametrize("script", [MULTI_NODE, RUN_CLUSTER, *(ROOT / "scripts").glob("*.sh")], ids=lambda p: p.name)
def test_bash_can_read_it(script: Path) -> None:
    done = subprocess.run(["bash", "-n", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "set -euo pipefail" in script.read_text()


@pytest.mark.parametrize(
    ("args", "variables", "words"),
    [
        ([], {}, "usage: "),
        (["boss", "10.0.0.1"], {}, "'boss' is neither leader nor worker"),
        (["leader"], {}, "MASTER_ADDR is missing"),
        (["leader", "--nnodes"], {}, "MASTER_ADDR is missing"),
        (["leader", "10.0.0.1", "--dtype"], {}, "MODEL comes before '--dtype'"),
        (["leader", "10.0.0.1"], {"MASTER_PORT": "http"}, "MASTER_PORT='http' is not a whole number from 1 to 65535"),
        (["leader", "10.0.0.1"], {"MASTER_PORT": "70000"}, "MASTER_PORT='70000' is not"),
        (["leader", "10.0.0.1"], {"TP": "0"}, "TP='0' is not"),
        (["leader", "10.0.0.1"], {"NNODES": "08"}, "NNODES='08' is not"),
        (["leader", "10.0.0.1"], {"NNODES": "3"}, "TP x PP = 4 ranks do not divide among NNODES=3"),
        (["leader", "10.0.0.1"], {"DP": "3"}, "DP=3 replicas do not divide among NNODES=2"),
        (["leader", "10.0.0.1"], {"DP": "2", "NNODES": "4", "TP": "1", "PP": "1"}, "of each of DP=2 replicas do not divide among NNODES=4"),
        (["leader", "10.0.0.1"], {"SERVE": "yes"}, "SERVE='yes' is neither 1"),
        (["worker", "10.0.0.1"], {"NODE_RANK": "2"}, "NODE_RANK=2 is not below NNODES=2"),
    ],
)
def test_multi_node_says_what_is_wrong(args: list[str], variables: dict[str, str], words: str, tools: Path) -> None:
    done = run(MULTI_NODE, *args, tools=tools, **variables)
    assert done.returncode == 2 and words in done.stderr and "usage: " in done.stderr, done.stderr
    assert not (tools.parent / "said").exists()


def test_multi_node_starts_the_leader(tools: Path) -> None:
    done = run(MULTI_NODE, "leader", "10.0.0.1", "./my-llama", "--dtype", "float32", tools=tools, PROMPT="a b", MASTER_PORT="1234")
    assert done.returncode == 0, done.stderr
    words = (
        "generate ./my-llama --node-rank 0 --nnodes 2 --master-addr 10.0.0.1 --master-port 1234 --tensor-parallel-size 2"
        " --pipeline-parallel-size 2 --temperature 0 --prompt"
    )
    assert said(tools) == [*words.split(), "a b", "--dtype", "float32"]


@pytest.mark.parametrize("model", [[], [""]])
def test_multi_node_starts_a_worker(model: list[str], tools: Path) -> None:
    assert run(MULTI_NODE, "worker", "head", *model, tools=tools, TP="4", PP="1", NNODES="4", NODE_RANK="3").returncode == 0
    words = "generate --headless --node-rank 3 --nnodes 4 --master-addr head --master-port 29501 --tensor-parallel-size 4"
    assert said(tools) == [*words.split(), "--pipeline-parallel-size", "1"]


@pytest.mark.parametrize(
    ("role", "first"), [("leader", "serve my-llama --node-rank 0"), ("worker", "serve my-llama --headless --node-rank 1")]
)
def test_multi_node_starts_a_server(role: str, first: str, tools: Path) -> None:
    """With the same options on both sides: a headless server knows all that a server knows."""
    done = run(MULTI_NODE, role, "head", "my-llama", "--port", "80", tools=tools, SERVE="1")
    assert done.returncode == 0, done.stderr
    words = f"{first} --nnodes 2 --master-addr head --master-port 29501 --tensor-parallel-size 2 --pipeline-parallel-size 2 --port 80"
    assert said(tools) == words.split()


def test_multi_node_starts_replicas(tools: Path) -> None:
    assert run(MULTI_NODE, "worker", "head", tools=tools, TP="1", PP="1", NNODES="2", DP="4").returncode == 0
    assert said(tools)[-4:] == ["--pipeline-parallel-size", "1", "--data-parallel-size", "4"]


@pytest.mark.parametrize(
    ("args", "variables", "words"),
    [
        ([], {}, "usage: "),
        (["--head"], {}, "IMAGE comes first, not '--head'"),
        (["image"], {}, "HEAD_ADDRESS is missing"),
        (["image", "--head"], {}, "HEAD_ADDRESS is missing"),
        (["image", "http://10.0.0.1", "--head"], {}, "is no address"),
        (["image", "10.0.0.1"], {}, "the third argument is missing"),
        (["image", "10.0.0.1", "--boss"], {}, "'--boss' is neither --head nor --worker"),
        (["image", "10.0.0.1", "--head"], {"RAY_PORT": "99999"}, "RAY_PORT='99999' is not a port"),
    ],
)
def test_run_cluster_says_what_is_wrong(args: list[str], variables: dict[str, str], words: str, tools: Path) -> None:
    done = run(RUN_CLUSTER, *args, tools=tools, **variables)
    assert done.returncode == 2 and words in done.stderr and "usage: " in done.stderr, done.stderr
    assert not (tools.parent / "said").exists()


@pytest.mark.parametrize(("script", "args"), [(MULTI_NODE, ["leader", "a"]), (RUN_CLUSTER, ["image", "a", "--head"])])
def test_a_missing_program_is_named(script: Path, args: list[str], tools: Path) -> None:
    (tools / "lockstep").unlink()
    (tools / "docker").unlink()
    done = run(script, *args, tools=tools)
    assert done.returncode == 1 and re.search("there is no '(lockstep|docker)' command", done.stderr)


def test_run_cluster_starts_a_head_and_removes_its_container(tools: Path) -> None:
    assert run(RUN_CLUSTER, "image:1", "10.0.0.1", "--head", "--gpus", "all", tools=tools).returncode == 0
    text = " ".join(said(tools))
    assert (
        "--name lockstep-ray-head --network host --shm-size 8g --env LOCKSTEP_HOST_IP=10.0.0.1 --gpus all --entrypoint ray image:1" in text
    )
    assert "image:1 start --block --head --node-ip-address=10.0.0.1 --port=6379" in text
    assert text.endswith("rm --force c0ffee")


def test_run_cluster_starts_a_worker(tools: Path) -> None:
    assert run(RUN_CLUSTER, "image:1", "head", "--worker", tools=tools, RAY_PORT="7000", LOCKSTEP_HOST_IP="10.0.0.2").returncode == 0
    text = " ".join(said(tools))
    assert "--env LOCKSTEP_HOST_IP=10.0.0.2 --entrypoint ray image:1" in text
    assert "start --block --address=head:7000 --node-ip-address=10.0.0.2" in text


def test_run_cluster_hands_secrets_on_without_showing_them(tools: Path) -> None:
    secrets = {"LOCKSTEP_CLUSTER_KEY": "s3cret", "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "t0ken"}
    done = run(RUN_CLUSTER, "image:1", "10.0.0.1", "--head", tools=tools, **secrets)
    assert "--env LOCKSTEP_CLUSTER_KEY --env RAY_AUTH_MODE --env RAY_AUTH_TOKEN --entrypoint" in " ".join(said(tools))
    assert not {"s3cret", "t0ken"} & set(" ".join(said(tools)).replace("=", " ").split()) and done.stderr == ""
    done = run(RUN_CLUSTER, "image:1", "10.0.0.1", "--head", tools=tools)
    assert "RAY_AUTH_MODE=token is not set" in done.stderr


@pytest.mark.parametrize("script", [MULTI_NODE, RUN_CLUSTER], ids=lambda p: p.name)
def test_scripts_name_the_secret(script: Path, tools: Path) -> None:
    assert "LOCKSTEP_CLUSTER_KEY=..." in run(script, tools=tools).stderr


def test_run_cluster_leaves_a_container_of_the_same_name_alone(tools: Path) -> None:
    stand_in(tools, "docker", 'printf "%s\\n" "$@" >>"$SAID"; [[ $1 != run ]] || exit 125')  # as when the name is taken
    assert run(RUN_CLUSTER, "image:1", "head", "--worker", tools=tools).returncode == 125
    assert "rm" not in said(tools)


def test_an_interrupted_run_cluster_removes_its_container(tools: Path) -> None:
    process = subprocess.Popen([RUN_CLUSTER, "image:1", "head", "--worker"], env=environment(tools, SLEEP="50"), stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 30
        while not list(tools.parent.glob("tmp.*/id")) and time.monotonic() < deadline:
            time.sleep(0.02)
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 143
    finally:
        process.kill()
    assert said(tools)[-3:] == ["rm", "--force", "c0ffee"]
    assert not list(tools.parent.glob("tmp.*"))


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda p: p.name)
def test_an_example_has_help_and_a_guard(path: Path) -> None:
    tree = ast.parse(path.read_text())
    assert ast.get_docstring(tree)
    guards = [n for n in tree.body if isinstance(n, ast.If) and ast.unparse(n.test) == "__name__ == '__main__'"]
    assert len(guards) == 1 and tree.body[-1] is guards[0]
    done = subprocess.run(
        [sys.executable, path, "--help"], env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    assert "--max-tokens" in done.stdout and path.name in done.stdout


@pytest.mark.parametrize("path", [p for p in EXAMPLES if p.name.startswith("torchrun")], ids=lambda p: p.name)
def test_a_torchrun_example_alone_says_how_to_start_it(path: Path) -> None:
    plain = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    done = subprocess.run([sys.executable, path], env={**plain, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1 and f"torchrun --nproc-per-node=2 examples/{path.name}" in done.stderr


# The Dockerfile


def instructions() -> list[tuple[str, str]]:
    """(instruction, its text) of the Dockerfile, continued lines joined."""
    lines = [line for line in DOCKERFILE.read_text().splitlines() if line.strip() and not line.lstrip().startswith("#")]
    joined = re.sub(r"\\\n\s*", " ", "\n".join(lines)).splitlines()
    return [(line.split(None, 1)[0], line.split(None, 1)[1]) for line in joined]


def test_dockerfile_has_what_it_needs() -> None:
    names = [name for name, _ in instructions()]
    known = {"ARG", "FROM", "RUN", "COPY", "WORKDIR", "ENV", "USER", "ENTRYPOINT", "CMD"}
    assert set(names) <= known
    assert next(name for name in names if name != "ARG") == "FROM"
    assert names.count("ENTRYPOINT") == 1 and ("ENTRYPOINT", '["lockstep"]') in instructions()
    assert ("USER", "10001") in instructions(), "Kubernetes' runAsNonRoot wants a number"


def test_dockerfile_names_exact_versions() -> None:
    args = dict(text.split("=", 1) for name, text in instructions() if name == "ARG")
    images = [re.sub(r"\$\{(\w+)\}", lambda m: args[m[1]], text.split()[0]) for name, text in instructions() if name == "FROM"]
    images += re.findall(r"--build-arg BASE=(\S+)", DOCKERFILE.read_text())
    assert len(images) == 3
    for image in images:
        assert re.fullmatch(r"[a-z0-9./_-]+:(?!latest)[\w.-]+", image), image
    assert args["TORCH"] in (ROOT / "constraints.txt").read_text().splitlines()


def test_dockerfile_copies_what_is_there_and_not_ignored() -> None:
    sent = {line[1:] for line in (ROOT / "deploy" / "Dockerfile.dockerignore").read_text().splitlines() if line.startswith("!")}
    copied = {word for name, text in instructions() if name == "COPY" and "--from" not in text for word in text.split()[:-1]}
    assert copied == sent
    assert all((ROOT / path).exists() for path in copied)
