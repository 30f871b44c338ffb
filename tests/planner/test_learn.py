"""docs/learn/ and `lockstep simulate`: what the pages show is what the code makes, and the exercises' solutions run."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

from lockstep.cli import simulate
from lockstep.cli.main import main
from scripts import learn_pictures

ROOT = Path(__file__).parents[2]
PAGES = sorted((ROOT / "docs" / "learn").glob("*.md"))
EXERCISES = ROOT / "docs" / "learn" / "exercises.md"
SOLUTIONS = re.findall(r"```python\n(.*?)```", EXERCISES.read_text(), re.DOTALL)


@pytest.mark.parametrize("name", learn_pictures.PICTURES)
def test_a_picture_is_up_to_date(name):
    drawn = learn_pictures.PICTURES[name]()
    assert (learn_pictures.IMAGES / f"{name}.svg").read_text() == drawn, "run python scripts/learn_pictures.py"
    ElementTree.fromstring(drawn)


def test_every_picture_is_shown_and_there_is_no_other():
    shown = {link for page in PAGES for link in re.findall(r"\]\(images/([^)]+)\)", page.read_text())}
    there = {path.name for path in learn_pictures.IMAGES.iterdir()}
    assert shown == there == {f"{name}.svg" for name in learn_pictures.PICTURES}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_a_page_shows_what_its_commands_print(page):
    assert page.read_text() == learn_pictures.refreshed(page.read_text()), "run python scripts/learn_pictures.py"


def test_the_check_can_fail():
    page = "```console\n$ lockstep simulate pipeline -pp 1 -m 1\nold\n```"
    assert "1 stages, 1 micro-batches" in learn_pictures.refreshed(page)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_link_leads_somewhere(page):
    for link in re.findall(r"\]\(([^)#:]+)\)", page.read_text()):
        assert (page.parent / link).exists(), link


@pytest.mark.parametrize("name", simulate.SIMULATORS)
def test_every_simulator_has_a_page(name):
    text = (ROOT / "docs" / "learn" / f"{name}.md").read_text()
    assert f"$ lockstep simulate {name}" in text and "(images/" in text
    assert f"]({name}.md)" in (ROOT / "docs" / "learn" / "README.md").read_text()


def test_there_are_four_exercises_each_with_a_solution():
    assert len(re.findall(r"^## ", EXERCISES.read_text(), re.MULTILINE)) == len(SOLUTIONS) == 4


@pytest.mark.parametrize("number", range(len(SOLUTIONS)))
def test_a_solution_runs(number):
    assert "assert " in SOLUTIONS[number]
    exec(compile(SOLUTIONS[number], f"{EXERCISES.name}: exercise {number + 1}", "exec"), {})


@pytest.mark.parametrize("name", simulate.SIMULATORS)
def test_the_command_prints_text_or_json_and_draws(name, tmp_path, capsys):
    small = {"data": ["--requests", "40"], "experts": ["--tokens", "64"]}.get(name, [])
    file = tmp_path / "picture.svg"
    assert main(["simulate", name, *small, "--json", "--svg", str(file)]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["simulator"] == name and set(found) > {"options"}
    ElementTree.fromstring(file.read_text())
    assert main(["simulate", name, *small]) == 0
    first = capsys.readouterr().out
    assert main(["simulate", name, *small]) == 0
    assert capsys.readouterr().out == first != ""


def test_json_keeps_fractions_exact(capsys):
    assert main(["simulate", "pipeline", "-pp", "4", "-m", "8", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["idle_simulated"] == found["idle_formula"] == "3/11" and found["makespan"] == 11


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["pipelin"], "Did you mean 'pipeline'?"),
        (["pipeline", "--stage-times", "1,2"], "--stage-times"),
        (["experts", "--experts", "10"], "--experts=10"),
        (["experts", "--experts", "7"], "--experts=7 are fewer than the 8"),
        (["experts", "--experts", "3"], "--experts=3 are fewer than the 4"),
        (["experts", "--redundant", "3"], "--redundant=3 cannot be shared evenly by 8 ranks (ranks): take 0 or 8"),
        (["tp", "--sizes", "128"], "--sizes=128 counts the layer for 128 ranks, more than --heads=64"),
        (["tp", "--heads", "10", "--kv-heads", "3"], "--heads=10 must be a multiple of --kv-heads=3"),
        (["tp", "--svg", "x.png"], "--svg=x.png is written as SVG"),
        (["tp", "--svg", "/nowhere/at/all.svg"], "--svg=/nowhere/at/all.svg"),
    ],
)
def test_mistakes_are_one_line_and_exit_2(argv, said, capsys):
    assert main(["simulate", *argv]) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1


def test_help_names_all_of_them(capsys):
    assert main(["simulate", "--help"]) == 0
    out = capsys.readouterr().out
    assert all(f"\n  {name} " in out for name in simulate.SIMULATORS)
    assert main(["simulate"]) == 2


@pytest.mark.parametrize("name", simulate.SIMULATORS)
def test_help_tells_the_lesson_within_the_terminal(name, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "60")
    with pytest.raises(SystemExit):
        main(["simulate", name, "--help"])
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines())) <= 60 and len(out.partition("usage:")[0]) > 300


def test_the_crossover_says_who_wins_on_which_side(capsys):
    assert main(["simulate", "collectives", "--between-step-us", "0.84", "--tokens", "1,2048"]) == 0
    out = capsys.readouterr().out
    rows = [line.split() for line in out.splitlines() if line.split()[:1] in (["1"], ["2048"])][-2:]
    assert rows[0][-1] == "TP16" and rows[1][-3:] == ["TP8", "x", "PP2"]
    assert "crossover: TP16 is faster below 88 tokens, TP8 x PP2 from there on" in out


def test_no_torch_is_loaded():
    code = (
        "import sys, lockstep.cli.main as m\n"
        f"for name in {list(simulate.SIMULATORS)!r}:\n    assert m.main(['simulate', name, '--json']) == 0\n"
        "assert 'torch' not in sys.modules and 'transformers' not in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, cwd=ROOT)
    assert done.returncode == 0, done.stderr
