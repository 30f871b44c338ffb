"""`plan` and `lockstep plan`: what is promised is kept or named, and every format says the same."""

import json
import subprocess
import sys
import xml.etree.ElementTree as ET
from dataclasses import replace

import pytest

from lockstep.cli.main import main
from lockstep.config.errors import ConfigError
from lockstep.planner import plan
from lockstep.planner.catalogue import cluster
from lockstep.planner.find import find_model
from lockstep.planner.layer import Setting
from lockstep.planner.load import Serving, Workload
from lockstep.planner.pareto import Frontier, Mark, as_text
from lockstep.planner.search import Search
from lockstep.planner.step import Pricer
from lockstep.planner.terms import total_s
from lockstep.planner.words import ms

ASK = {"input_len": 2000, "output_len": 300, "rate": 8.0, "ttft": 0.5, "tpot": 0.04}


@pytest.fixture(scope="module")
def found():
    return plan("llama-3.1-70b", "2x8xH100", price=2.5, **ASK)


def test_promises_are_kept_and_every_term_is_in_the_total(found):
    assert found.meets and not found.misses
    assert found.ttft_s <= ASK["ttft"] and found.tpot_s <= ASK["tpot"] and found.rate == ASK["rate"]
    assert total_s(found.ttft_terms) == found.ttft_s and total_s(found.tpot_terms) == found.tpot_s
    assert found.admits["both"] >= ASK["rate"] and found.admits["both"] == min(found.admits.values())
    assert found.cost_per_million == pytest.approx(2.5 * found.layout.devices / 3600 / (ASK["rate"] * 300) * 1e6)
    assert found.memory.fixed + found.kv_bytes <= 0.9 * cluster("H100").device.capacity_bytes


def test_no_layout_with_fewer_devices_would_do(found):
    """The winner against every other layout of the space, each at every load."""
    search = Search(Pricer(Setting(find_model("llama-3.1-70b")[0], cluster("2x8xH100"))), Workload(2000, 300, 8.0, 0.5, 0.04), Serving())
    for c in search.all():
        if not c.fits:
            continue
        replica = search.replica(c.layout, c.chunk)
        good = [p.rate for p in map(replica.at, range(1, c.fits + 1)) if not search.work.misses(p)]
        devices = found.layout.devices - 1
        if good and c.layout.devices <= devices:
            assert max(good) * (devices // c.layout.devices) * c.layout.dp < ASK["rate"], c


def test_each_runner_up_says_in_one_line_why_it_lost(found):
    assert len(found.runners) >= 3
    for runner in found.runners:
        assert runner.reason and "\n" not in runner.reason
    wide = next(r for r in found.runners if r.layout.tp == 16)
    assert "spans 2 nodes" in wide.reason and "us between nodes" in wide.reason


def test_a_promise_that_cannot_be_kept_gives_the_nearest_plan_and_exit_code_0(capsys):
    assert main(["plan", "llama-3.1-8b", "--cluster", "1x8xH100", "--tpot", "0.0001", "--rate", "4"]) == 0
    out = capsys.readouterr().out
    assert "the nearest plan; it misses: TPOT is" in out and "lockstep serve meta-llama/Meta-Llama-3.1-8B" in out


def test_a_rate_that_is_too_high_keeps_the_latencies_and_says_what_is_carried():
    found = plan("llama-3.1-70b", "2x8xH100", **{**ASK, "rate": 500.0})
    assert not found.meets and found.rate < 500
    assert found.ttft_s <= ASK["ttft"] and found.tpot_s <= ASK["tpot"] and "500 were asked for" in found.misses[0]


def test_no_room_says_what_is_missing_and_what_fits(capsys):
    assert main(["plan", "llama-3.1-70b", "--cluster", "1x1xH100"]) == 2
    error = capsys.readouterr().err
    assert "GiB more per rank" in error and "int8 (not startable on a GPU) or TP=2 on 1 node (2 devices) fits" in error
    assert main(["plan", "llama-3.1-70b", "--cluster", "1x1xA100"]) == 2
    assert "int8 (not startable on a GPU) or TP=2 on 1 node (2 devices) fits" in capsys.readouterr().err


def test_json_and_text_and_svg_say_the_same(tmp_path, capsys):
    picture = tmp_path / "trade.svg"
    argv = ["plan", "mixtral-8x7b", "--cluster", "1x8xH100", "--input-len", "500", "--plot", str(picture)]
    assert main([*argv, "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert main([*argv, "--explain"]) == 0
    text = capsys.readouterr().out
    assert ms(data["tpot_s"]) in text and f"{data['memory']['weights']:,} B" in text
    assert data["commands"][0]["line"] in text and "[experts]" in text and "overheads are assumed" in text
    dots = ET.fromstring(picture.read_text()).findall("{http://www.w3.org/2000/svg}circle")
    assert len(dots) == len(data["pareto"]) + 1  # and the plan's own


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["nosuchmodel"], "not in the catalogue"),
        (["llama-3.1-8", "--cluster", "8xH100"], "llama-3.1-8b"),
        (["llama-3.1-8b", "--cluster", "8xNOPE"], "NOPE"),
        (["qwen3-235b"], "Did you mean 'qwen3-235b-a22b'?"),
        (["nosuchmodel"], "error: model 'nosuchmodel' is"),
        (["llama-3.1-8b", "--rate", "inf"], "--rate=inf must be more than 0 and finite"),
        (["llama-3.1-8b", "--price", "-2"], "--price='-2': give dollars per device-hour"),
        (["llama-3.1-8b", "--price", "nan"], "--price='nan': give dollars per device-hour"),
        (["llama-3.1-8b", "--fix", "tp=8,TP=4"], "gives tp twice"),
        (["llama-3.1-8b", "--hosts", "a,b,c", "--cluster", "2x8xH100"], "names 3 different hosts"),
        (["llama-3.1-8b", "--cluster", "2x8xH100", "--inter-scale", "0"], "--inter-scale is 0.0: it must be a number above 0"),
        (["qwen3-235b-a22b", "--startable"], "is startable: the engine does not run MoE yet; leave --startable out"),
        (["llama-3.1-8b", "--startable", "--fix", "cp=2"], "does not run context parallelism yet"),
        (["llama-3.1-8b", "--startable", "-q", "fp8"], "does not run fp8 weights yet"),
        (["deepseek-v3"], "deepseek-v3 with fp8 weights (as published) does not fit on 1x8xH100"),
        (["llama-3.1-8b", "--rate", "0"], "--rate=0 must be more than 0"),
        (["llama-3.1-8b", "--rate", "nan"], "must be more than 0"),
        (["llama-3.1-8b", "--input-len", "0"], "must be at least 1"),
        (["llama-3.1-8b", "--input-len", "999999"], "131072 positions"),
        (["llama-3.1-8b", "--fix", "tp=x"], "no axis with a size"),
        (["llama-3.1-8b", "--fix", "tp=9"], "9 devices is more than the 8 there are"),
        (["llama-3.1-8b", "--plot", "x.gif"], ".svg or a .png"),
        (["llama-3.1-8b", "--hosts", "a,b", "--cluster", "3x8xH100"], "3 nodes"),
    ],
)
def test_mistakes_are_one_line_and_exit_code_2(argv, words, capsys):
    assert main(["plan", *argv]) == 2
    assert words in capsys.readouterr().err


def test_fixed_axes_are_kept_and_startable_leaves_out_what_does_not_run():
    assert plan("llama-3.1-70b", "2x8xH100", fixed={"tp": 16}).layout.tp == 16
    assert plan("llama-3.1-8b", "1x8xH100", fixed={"dp": 2, "tp": 4}).layout.dp == 2
    ask = {"input_len": 8000, "output_len": 200, "rate": 0.2, "ttft": 0.6}
    free, kept = (plan("llama-3.1-70b", "2x8xH100", startable=only, **ask) for only in (False, True))
    assert kept.startable and (kept.layout.ep, kept.layout.cp, kept.layout.dcp) == (1, 1, 1)
    assert free.layout != kept.layout and free.missing == ["context parallelism"] and not free.startable


def test_the_search_finds_what_trying_everything_finds():
    """Bisection over the load, against every load."""
    search = Search(Pricer(Setting(find_model("qwen3-8b")[0], cluster("1x4xH100"))), Workload(1000, 100, None, 0.2, 0.02), Serving())
    for c in search.all():
        replica = search.replica(c.layout, c.chunk)
        good = [b for b in range(1, min(c.fits, replica.most) + 1) if not search.work.misses(replica.at(b))]
        assert (search.refined(c).best.concurrency if c.best else 0) == max(good, default=0)
        if c.best:
            rate = c.best.rate * 0.7
            assert search.at_rate(replica, c.fits, rate).concurrency == next(b for b in range(1, c.fits + 1) if replica.at(b).rate >= rate)


def test_nothing_on_the_frontier_is_beaten():
    marks = [Mark("", i, user, device, 0.0) for i, (user, device) in enumerate([(1, 9), (2, 9), (5, 5), (4, 4), (9, 1), (9, 0.5), (3, 6)])]
    assert [(m.user, m.device) for m in Frontier(marks).marks] == [(9, 1), (5, 5), (3, 6), (2, 9)]
    assert as_text(Frontier(marks).marks, marks[3]).count("X") == 2  # the legend names it, and it is there


def test_a_model_of_a_folder_a_file_and_a_changed_config(tmp_path):
    raw = {**json.loads(json.dumps(find_config("llama-3.1-8b")))}
    (tmp_path / "config.json").write_text(json.dumps(raw))
    by_name = plan("llama-3.1-8b", "1x1xH100")
    for name in (tmp_path, tmp_path / "config.json"):
        found = plan(str(name), "1x1xH100")
        assert (found.tpot_s, found.memory) == (by_name.tpot_s, by_name.memory)
        assert str(tmp_path) in found.commands[0].line and "config.json" not in found.commands[0].line
    with pytest.raises(ConfigError, match="num_hidden_layers"):
        (tmp_path / "config.json").write_text(json.dumps({k: v for k, v in raw.items() if k != "num_hidden_layers"}))
        plan(str(tmp_path), "1x1xH100")


def find_config(name):
    from lockstep.planner.find import catalogue

    return catalogue()[name]["config"]


def test_a_faster_fabric_never_makes_a_plan_slower():
    here = cluster("2x8xH100")
    fast = replace(here, inter=replace(here.inter, bandwidth=here.inter.bandwidth * 10, launch_s=here.inter.launch_s / 10))
    slow_plan, fast_plan = (plan("llama-3.1-405b", c, fixed={"tp": 16}, input_len=500) for c in (here, fast))
    assert fast_plan.rate > slow_plan.rate


def test_planning_loads_no_torch():
    code = "import sys; from lockstep.cli.main import main; main(['plan', 'qwen3-0.6b', '--no-draw']); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and done.stdout.splitlines()[-1] == "False", done.stderr


def test_units_that_look_wrong_are_doubted():
    notes = plan("qwen3-0.6b", "1xH100", tpot=30, ttft=500).notes
    assert any("--tpot 30 is in seconds" in note for note in notes) and any("--ttft 500" in note for note in notes)
    assert not [note for note in plan("qwen3-0.6b", "1xH100", tpot=0.03, ttft=0.5).notes if "seconds" in note]


def test_published_weights_are_said_and_can_be_left(capsys):
    found = plan("deepseek-v3", "2x8xH100")
    assert any("as published, in fp8" in note for note in found.notes)
    with pytest.raises(ConfigError, match="deepseek-v3 does not fit"):
        plan("deepseek-v3", "2x8xH100", quantization="none")


def test_one_token_prints_no_time_per_token(capsys):
    assert main(["plan", "llama-3.1-8b", "--output-len", "1", "--tpot", "0.03", "--explain"]) == 0
    out = capsys.readouterr().out
    assert "TPOT (mean)   -" in out and "TPOT alone" not in out and "a prompt takes" in out and "TPOT takes no part" in out


def test_half_a_link_is_slower_and_its_numbers_are_printed(capsys):
    texts = []
    for scale in ("1", "0.5"):
        argv = ["plan", "llama-3.1-70b", "--cluster", "2x8xH100", "--fix", "TP=16", "--explain", "--no-draw", "--inter-scale", scale]
        assert main(argv) == 0
        texts.append(capsys.readouterr().out)
    found = cluster("2x8xH100").inter
    for text, scale in zip(texts, (1, 0.5), strict=True):
        assert f"between nodes  {found.bandwidth * scale / 1e9:,.1f} GB/s" in text
    rates = [plan("llama-3.1-70b", c, fixed={"tp": 16}).rate for c in (cluster("2x8xH100").with_links(inter=found.scaled(0.5)), "2x8xH100")]
    assert rates[0] < rates[1]


def test_many_commands_are_collapsed_in_text_and_whole_in_json(capsys):
    argv = ["plan", "llama-3.1-8b", "--cluster", "40x8xH100", "--no-draw"]
    assert main(argv) == 0
    lines = capsys.readouterr().out.splitlines()
    shown = lines[lines.index("start it with") + 1 :]
    assert len(shown) < 10 and "likewise 36 more (node3 to node38, each with its own -dpr)" in shown[-3] and shown[-2] == "  node39:"
    assert main([*argv, "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)["commands"]) == 40


def test_an_unknown_hub_id_is_asked_for_once(monkeypatch):
    asked = []

    def fails(url, **options):
        asked.append((url, options["timeout"]))
        raise TimeoutError

    monkeypatch.setattr("huggingface_hub.get_hf_file_metadata", fails)
    with pytest.raises(ConfigError, match="could not be had from the hub"):
        plan("nobody/nothing", "1xH100")
    assert len(asked) == 1 and asked[0][0].endswith("nobody/nothing/resolve/main/config.json") and asked[0][1] <= 10


@pytest.mark.parametrize("name", ["meta-llama/Meta-Llama-3.1-8B-Instruct", "meta-llama/Llama-3.1-8B", "meta-llama/Llama-3.1-8B-Instruct"])
def test_a_hub_id_is_served_as_it_was_typed(name):
    found = plan(name, "1x1xH100")
    assert found.model == "llama-3.1-8b"
    assert f" {name} " in found.commands[0].line
