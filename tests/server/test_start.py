"""How a server starts, or does not: what is wrong is told in one line before anything is loaded, and Ctrl-C ends it at any moment."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
import tomllib
from pathlib import Path
from typing import Any

import pytest

from lockstep.cli.main import main
from lockstep.config.serve import ServeOptions
from lockstep.server import launch, run_batch
from lockstep.testing.executors import children_of, wait_for
from lockstep.testing.server import ROOT
from lockstep.utils import procs


@pytest.fixture
def refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    """`refused("serve", ...)`: the one line with which that command ends before it loads anything."""

    def load(*_: Any, **__: Any) -> None:
        raise AssertionError("it was not refused")

    monkeypatch.setattr(launch, "EngineKeeper", load)
    monkeypatch.setattr(run_batch, "EngineKeeper", load)

    def line(*argv: str) -> str:
        assert main(list(argv)) == 2
        said = capsys.readouterr().err
        assert said.startswith("error: ") and said.count("\n") == 1, said
        return said

    return line


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("broken {% if", "unexpected 'end of template' in line 1"),
        ("\n{{ x | nothing }}", "No filter named 'nothing' in line 2"),
        ("{% break %}", ""),
    ],
)
def test_a_template_that_is_none(tmp_path: Path, refused: Any, text: str, why: str) -> None:
    template, asked = tmp_path / "broken.jinja", tmp_path / "in.jsonl"
    template.write_text(text)
    asked.write_text("{}\n")
    expected = f"--chat-template='{template}' is no Jinja template: {why}"
    assert expected in refused("serve", "--port", "0", "--chat-template", str(template))
    batch = ("run-batch", "-i", str(asked), "-o", str(tmp_path / "out.jsonl"))
    assert expected in refused(*batch, "--chat-template", str(template))


@pytest.mark.parametrize("flag", ["--profile-dir", "--incident-dir"])
def test_a_folder_that_cannot_be_written_to(tmp_path: Path, refused: Any, flag: str) -> None:
    (tmp_path / "file").write_text("")
    for path in ("/proc/x", "/proc", str(tmp_path / "file")):
        assert f"{flag}={path!r} cannot be written to" in refused("serve", "--port", "0", flag, path)
    with pytest.raises(AssertionError, match="not refused"):
        refused("serve", "--port", "0", flag, str(tmp_path / "new" / "folder"))
    assert not list((tmp_path / "new" / "folder").iterdir())


def test_where_it_is_is_one_more_line_of_json(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    given = ServeOptions(port=0)
    with launch.listen(given) as listener:
        launch.announce(given, "m", listener)
        plain = capsys.readouterr().err.splitlines()
        monkeypatch.setenv("LOCKSTEP_LOG_FORMAT", "json")
        launch.announce(given, "m", listener)
    lines = [json.loads(line) for line in capsys.readouterr().err.splitlines()]
    assert [line["message"] for line in lines] == [line.strip() for line in plain]
    assert plain[0].startswith("lockstep serves m at http://127.0.0.1:") and all(line["level"] == "info" for line in lines)


# --- signals ---


def start(*before: str, entry: str = "-m lockstep", **more: Any) -> subprocess.Popen[str]:
    """`lockstep serve`, as it is started from a shell. before: words in front of the command."""
    command = [*before, sys.executable, *entry.split(maxsplit=1), "serve", "--port", "0", "--no-cpu-binding"]
    pipes: dict[str, Any] = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    return subprocess.Popen(command, env={**os.environ, "PYTHONPATH": str(ROOT), **more}, text=True, start_new_session=True, **pipes)


def until_it_imports(pid: int) -> None:
    """Until the process is past its interpreter's own start, and has the first library that it imports."""
    assert wait_for(lambda: "msgspec" in Path(f"/proc/{pid}/maps").read_text(), 60)


def mask(pid: int, name: str) -> int:
    with contextlib.suppress(OSError):
        found = re.search(rf"^{name}:\s*(\w+)", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE)
        return int(found[1], 16) if found else 0
    return 0


SIGINT_BIT = 1 << (signal.SIGINT - 1)
SCRIPT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]["lockstep"]
INSTALLED = "-c import sys; from {} import {}; sys.exit({}())".format(*SCRIPT.split(":"), SCRIPT.partition(":")[2])


@pytest.mark.parametrize("entry", ["-m lockstep", INSTALLED], ids=["module", "script"])
def test_ctrl_c_while_it_imports(entry: str) -> None:
    for after_s in (0.0, 0.15, 0.3, 0.5, 0.7, 1.0):
        with start(entry=entry) as server:
            until_it_imports(server.pid)
            time.sleep(after_s)
            server.send_signal(signal.SIGINT)
            said, _ = server.communicate(timeout=60)
            assert (server.returncode, said) == (130, "interrupted\n"), after_s


def test_a_background_job_does_not_hear_ctrl_c() -> None:
    with start("sh", "-c", 'trap "" INT; exec "$@"', "sh") as server:
        assert wait_for(
            lambda: mask(server.pid, "SigIgn") & SIGINT_BIT and "lockstep" in Path(f"/proc/{server.pid}/cmdline").read_text(), 60
        )
        assert server.stdout is not None
        for line in server.stdout:
            server.send_signal(signal.SIGINT)
            if line.startswith("lockstep serves"):
                break
        time.sleep(0.5)
        assert mask(server.pid, "SigIgn") & SIGINT_BIT and server.poll() is None
        server.terminate()
        assert server.wait(60) == 0


def test_sigterm_while_it_loads_leaves_nothing(tmp_path: Path) -> None:
    with start(TMPDIR=str(tmp_path)) as server:
        assert wait_for(lambda: list(tmp_path.glob("lockstep-*/.owned")), 60)
        below = children_of(server.pid)
        server.terminate()
        said, _ = server.communicate(timeout=60)
    assert (server.returncode, said) == (143, "terminated\n")
    assert not list(tmp_path.glob("lockstep-*")) and not any(procs.alive(pid) for pid in below)
