"""How a server starts, or does not: what is wrong is told in one line before anything is loaded, and Ctrl-C ends it at any moment."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from lockstep.cli.main import main
from lockstep.config.serve import ServeOptions
from lockstep.server import launch, run_batch


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
