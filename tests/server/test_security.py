"""The threats of docs/security.md, each with its defence shown at work. The table there names these tests."""

from __future__ import annotations

import ast
import os
import re
import stat
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
import zmq

from lockstep.cluster.health import EngineHealth
from lockstep.config.tree import EngineConfig
from lockstep.frontend import engine_wire as wire
from lockstep.frontend.chat import render
from lockstep.frontend.engine_server import EngineServer, bind
from lockstep.frontend.errors import PromptError
from lockstep.frontend.tokenizer import load_tokenizer
from lockstep.testing.server import running_server
from lockstep.utils.frames import NO_MESSAGE

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "lockstep"
ASK = {"prompt": "def f(", "max_tokens": 4, "temperature": 0}


def trees() -> dict[str, ast.Module]:
    return {str(p.relative_to(ROOT)): ast.parse(p.read_text()) for p in sorted(PACKAGE.rglob("*.py"))}


# --- what comes over a connection is never code ---


def test_no_file_names_a_serializer_that_runs_code() -> None:
    bad = {"pickle", "cloudpickle", "dill", "marshal", "shelve", "_pickle", "joblib"}
    found = []
    for name, tree in trees().items():
        for node in ast.walk(tree):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            found += [f"{name}:{node.lineno}" for n in names if n.split(".")[0] in bad]  # type: ignore[attr-defined]
            if isinstance(node, ast.Attribute) and node.attr in ("recv_pyobj", "send_pyobj", "Unpickler"):
                found.append(f"{name}:{node.lineno}")
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ("eval", "exec", "__import__"):
                found.append(f"{name}:{node.lineno}")
    assert not found


HOOK = """
import os, pickle, sys
def refused(*a, **k):
    where = "".join(f"{f.f_code.co_filename}:{f.f_lineno} " for f in iter_frames())
    with open(os.environ["PICKLE_LOG"], "a") as log:
        log.write(f"{sys.argv} {where}\\n")
    raise RuntimeError("something was unpickled")
def iter_frames():
    frame = sys._getframe(2)
    for _ in range(4):
        if frame is None: return
        yield frame
        frame = frame.f_back
pickle.loads = pickle.load = refused
class Refused:
    def __init__(self, *a, **k): refused()
pickle.Unpickler = Refused
open(os.environ["PICKLE_LOG"] + ".on", "a").write("x")
"""


def test_a_serving_tree_unpickles_nothing(tmp_path: Path) -> None:
    """Every process of it starts with `pickle.load` and its kin replaced by something that complains."""
    (tmp_path / "sitecustomize.py").write_text(HOOK)
    log = tmp_path / "log"
    path = os.pathsep.join([str(ROOT), str(tmp_path)])
    probe = subprocess.run(
        [sys.executable, "-c", "import pickle; pickle.loads(b'N.')"],
        env={**os.environ, "PYTHONPATH": path, "PICKLE_LOG": str(log)},
        capture_output=True,
        timeout=60,
    )
    assert probe.returncode == 1 and log.exists(), "the hook is not at work"
    log.unlink()
    with running_server("-asc", "2", tp=2, environment={"PYTHONPATH": path, "PICKLE_LOG": str(log)}) as server:
        answer = httpx.post(f"{server.url}/v1/completions", json=ASK, timeout=60)
        assert answer.status_code == 200, answer.text
        count = len(psutil.Process(server.pid).children(recursive=True)) + 1
        assert server.stop() == 0
    assert len((tmp_path / "log.on").read_text()) >= count
    assert not log.exists(), log.read_text()


def test_one_who_does_not_know_the_runs_secret_is_told_nothing(tmp_path: Path) -> None:
    class Client:
        config, memory, failure = EngineConfig(), None, None
        added: list[Any] = []

        def watch(self, fd: int) -> None:
            pass

        def abort(self, names: list[str]) -> None:
            pass

        def add_request(self, request: Any) -> None:
            self.added.append(request)

        def step(self) -> list[Any]:
            return []

        def health(self) -> EngineHealth:
            return EngineHealth(pid=1, born=1, replicas=[])

    context: zmq.Context[Any] = zmq.Context()
    endpoint = f"ipc://{tmp_path}/engine"
    server = EngineServer(Client(), bind(context, endpoint), "right")  # type: ignore[arg-type]
    peer = context.socket(zmq.DEALER)
    peer.setsockopt(zmq.LINGER, 0)
    peer.connect(endpoint)
    try:
        mine = wire.nonce()
        for said in (
            wire.Hello(mine),
            b"\x80\x04N.",
            b"\x92\xa5abort\x91\xa1\xff",
            b"\x91" * 5000,
            wire.Call(1, "ping", []),
            wire.Abort(["x"]),
            wire.Proof(b"guess"),
        ):
            peer.send(said if isinstance(said, bytes) else wire.encode(said))
        answers = []
        for _ in range(50):
            server.turn()
            while peer.poll(10):
                answers.append(wire.decode_reply(peer.recv()))
        assert [type(a) for a in answers] == [wire.Challenge]  # and no Welcome, no Answer
        challenge = answers[0]
        assert isinstance(challenge, wire.Challenge)
        assert wire.engine_proof("wrong", mine, challenge.nonce) != challenge.proof
        peer.send(wire.encode(wire.Hello(mine)))
        peer.send(wire.encode(wire.Proof(wire.api_proof("wrong", mine, challenge.nonce))))
        again = []
        for _ in range(50):
            server.turn()
            while peer.poll(10):
                again.append(wire.decode_reply(peer.recv()))
        assert [type(a) for a in again] == [wire.Challenge]
        assert not server._admitted and not Client.added
    finally:
        peer.close()
        server._socket.close()
        context.term()


@pytest.mark.parametrize(
    "payload", [b"", b"\x80\x04N.", b"\xc1", b"\x93\xa5hello", os.urandom(200), b"\x91" * 5000, b"\x92\xa5abort\x91\xa1\xff"]
)
def test_what_is_no_message_is_no_message(payload: bytes) -> None:
    with pytest.raises(NO_MESSAGE):
        wire.decode_order(payload)


# --- who can reach it ---


def listening_inodes() -> dict[str, tuple[str, int]]:
    """Socket inode -> (address in hexadecimal, port) of every TCP socket here that listens."""
    found = {}
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        for line in Path(table).read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A":
                address, port = fields[1].split(":")
                found[fields[9]] = (address, int(port, 16))
    return found


def listening(pids: list[int]) -> set[tuple[str, int]]:
    """What the processes listen at."""
    inodes, found = listening_inodes(), set()
    for pid in pids:
        for entry in Path(f"/proc/{pid}/fd").iterdir():
            try:
                target = os.readlink(entry)
            except FileNotFoundError:
                continue
            match = re.fullmatch(r"socket:\[(\d+)\]", target)
            if match and match[1] in inodes:
                found.add(inodes[match[1]])
    return found


def test_a_serving_tree_listens_at_its_port_on_loopback_and_nowhere_else() -> None:
    """But for gloo, which connects ranks: it listens in the ranks alone, on loopback."""
    with running_server("-asc", "2", tp=2, environment={"TMPDIR": tempfile.gettempdir()}) as server:
        assert httpx.post(f"{server.url}/v1/completions", json=ASK, timeout=60).status_code == 200
        pids = [server.pid, *(p.pid for p in psutil.Process(server.pid).children(recursive=True))]
        assert len(pids) >= 6  # the parent, two for HTTP, the engine, a replica, two ranks
        ranks = [pid for pid in pids if "lockstep.executor.worker_main" in psutil.Process(pid).cmdline()]
        assert len(ranks) == 2
        assert listening([pid for pid in pids if pid not in ranks]) == {("0100007F", server.port)}
        assert {address for address, _ in listening(ranks)} <= {"0100007F"}, "a rank listens beyond loopback"
        sockets = [line.split()[-1] for line in Path("/proc/net/unix").read_text().splitlines() if line.endswith("/engine")]
        assert sockets
        for path in sockets:
            assert stat.S_IMODE(Path(path).parent.stat().st_mode) == 0o700
        assert "only this machine can reach it" in server.said()


def test_open_to_others_without_a_key_is_said_loudly() -> None:
    with running_server("--host", "0.0.0.0", tp=1) as server:
        assert "ANYBODY" in server.said()
    with running_server("--host", "0.0.0.0", tp=1, environment={"LOCKSTEP_API_KEY": "k"}) as server:
        assert "ANYBODY" not in server.said()
        port = server.port
        assert httpx.get(f"http://127.0.0.1:{port}/v1/models").status_code == 401
        assert httpx.get(f"http://127.0.0.1:{port}/v1/models", headers={"Authorization": "Bearer k"}).status_code == 200
        for child in psutil.Process(server.pid).children(recursive=True):
            assert "LOCKSTEP_API_KEY" not in child.environ()


# --- what a model's folder or a request brings is data ---

ESCAPES = [
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ cycler.__init__.__globals__.os.system('touch HERE') }}",
    "{{ (''|attr('__class__')).__mro__ }}",
    "{% set f = '{0.__class__.__mro__}'.format %}{{ f(1) }}",
    "{{ lipsum.__globals__['os'].popen('touch HERE').read() }}",
    "{{ namespace.__init__.__globals__ }}",
]


@pytest.mark.parametrize("template", ESCAPES)
def test_a_chat_template_stays_in_its_sandbox(template: str, tmp_path: Path) -> None:
    from lockstep.config.source import find_folder

    tokenizer = load_tokenizer(find_folder("", None))
    tokenizer.chat_template = template.replace("HERE", str(tmp_path / "made"))
    talk = [{"role": "user", "content": "hi"}]
    try:
        text = render(tokenizer, talk)["prompt"]
    except PromptError as e:
        assert "template" in str(e)
    else:
        assert "class" not in text and "<module" not in text and "object" not in text
    assert not (tmp_path / "made").exists()


def test_code_of_a_checkpoint_is_never_run() -> None:
    """`trust_remote_code` is nowhere anything but False, and no flag says otherwise."""
    found = []
    for name, tree in trees().items():
        for node in ast.walk(tree):
            if isinstance(node, ast.keyword) and node.arg == "trust_remote_code":
                assert isinstance(node.value, ast.Constant) and node.value.value is False, name
                found.append(name)
    assert found
    done = subprocess.run(
        [sys.executable, "-m", "lockstep", "serve", "--trust-remote-code"],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 2 and "never run" in done.stderr


def test_the_server_fetches_nothing_that_a_request_names() -> None:
    """No module of the server or the frontend can open a URL at all: there is nothing for a request to aim."""
    clients = {"urllib.request", "http.client", "requests", "httpx", "aiohttp", "urllib3", "ftplib"}
    for name, tree in trees().items():
        if not name.startswith(("lockstep/server", "lockstep/frontend", "lockstep/engine")):
            continue
        for node in ast.walk(tree):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not set(names) & clients, name


# --- dependencies ---


def audit(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, str(ROOT / "scripts" / "audit.py"), *words], capture_output=True, text=True, timeout=150)


def test_the_audit_finds_nothing_here_and_can_find_something(tmp_path: Path) -> None:
    clean = audit()
    assert clean.returncode == 0, clean.stdout
    (tmp_path / "pins.txt").write_text("Jinja2==3.1.5\nother==1\n")
    found = audit("--constraints", str(tmp_path / "pins.txt"), "--pins-only")
    assert found.returncode == 1 and "jinja2 3.1.5 is older than 3.1.6" in found.stdout
    (tmp_path / "deny.txt").write_text("nonsense\n")
    assert audit("--deny", str(tmp_path / "deny.txt")).returncode != 0
    assert "scripts/audit.py" in (ROOT / ".ci" / "run").read_text()


def test_every_test_that_the_threat_model_names_exists() -> None:
    text = (ROOT / "docs" / "security.md").read_text()
    named = set(re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", text))
    assert len(named) >= 20
    for path, test in named:
        assert f"def {test}(" in (ROOT / path).read_text(), f"docs/security.md names {path}::{test}"
