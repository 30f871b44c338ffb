"""What the report promises, for whom, at what cost, and that it can be read on a narrow terminal."""

import json
import sys
import xml.etree.ElementTree as ET
from dataclasses import replace
from importlib.util import find_spec

import pytest

from lockstep.cli.main import main
from lockstep.config.errors import ConfigError
from lockstep.planner import plan
from lockstep.planner.catalogue import cluster
from lockstep.planner.compare import compare
from lockstep.planner.hardware import ErrorBand
from lockstep.planner.load import Point, Workload
from lockstep.planner.pareto import Asked, Mark, as_text, changes
from lockstep.planner.plot import as_svg
from lockstep.planner.promises import LIKELY, MISSED, SURE, judge
from lockstep.planner.report import report
from lockstep.planner.words import ms, wrapped

ASK = {"input_len": 2000, "output_len": 300}
SVG = "{http://www.w3.org/2000/svg}"


def test_a_promise_is_sure_likely_or_missed_by_its_error():
    work, band = Workload(100, 10, rate=10.0, ttft_s=1.0, tpot_s=0.1), ErrorBand(operation=0.1, tpot=0.25, ttft=0.5)
    found = judge(work, Point(4, ttft_s=0.66, tpot_s=0.081, rate=3.0), most=9.9, band=band)
    assert [(p.name, p.verdict) for p in found] == [("ttft", SURE), ("tpot", LIKELY), ("rate", MISSED)]
    assert judge(Workload(100, 10), Point(1, 1.0, 1.0, 1.0), 1.0, band) == [], "nothing was promised"
    assert [p.verdict for p in judge(replace(work, rate=None), Point(4, 0.67, 0.11, 3.0), 9.9, band)] == [LIKELY, MISSED]
    assert judge(work, Point(1, 2.0, 0.01, 1.0), 0.0, band)[2].verdict == MISSED, "no load keeps the latencies"


def test_the_report_says_that_promises_are_of_means_and_how_sure_they_are(capsys):
    assert main(["plan", "llama-3.1-70b", "--cluster", "8xH100", "--input-len", "512", "--tpot", "0.05", "--no-draw"]) == 0
    out = capsys.readouterr().out
    assert "TTFT (mean)" in out and "TPOT (mean)" in out and "not of percentiles" in out and "50.0 ms asked: kept if the prediction" in out
    assert "TPOT alone" in out and "TTFT alone" not in out and "both" not in out, "lines of promises that nobody made"


def test_a_margin_tightens_the_promises():
    loose, tight = (plan("llama-3.1-70b", "8xH100", tpot=0.04, margin=margin, **ASK) for margin in (0.0, 0.3))
    assert 0.04 * 0.7 < loose.tpot_s <= 0.04 and tight.tpot_s <= 0.04 * 0.7 and tight.meets
    assert tight.promises[0].asked == 0.04 and tight.promises[0].verdict == SURE
    short = plan("llama-3.1-70b", "8xH100", ttft=0.12, margin=0.9, **ASK)
    assert not short.meets and "less a margin of 90%" in short.misses[0]


def test_a_rate_that_is_too_high_says_how_many_nodes_carry_it():
    asked = {**ASK, "rate": 40.0, "ttft": 1.0, "tpot": 0.05}
    few = plan("llama-3.1-70b", "1x8xH100", **asked)
    assert not few.meets and few.enough and few.enough.devices == 8 * few.enough.nodes
    assert f"{few.enough.nodes} nodes ({few.enough.devices} devices) would carry 40 requests/s" in report(few)
    assert plan("llama-3.1-70b", f"{few.enough.nodes}x8xH100", **asked).meets
    assert not plan("llama-3.1-70b", f"{few.enough.nodes - 1}x8xH100", **asked).meets
    assert plan("llama-3.1-70b", "1x8xH100", **{**asked, "tpot": 1e-4}).enough is None, "no number of nodes makes one request faster"
    assert plan("llama-3.1-70b", "1x8xH100", fixed={"dp": 1}, **asked).enough is None, "it was told to have one replica"


def test_several_clusters_make_a_table_and_a_list(capsys):
    argv = ["plan", "llama-3.1-70b", "--cluster", "8xH200,2x8xH100,1xH100", "--rate", "5", "--tpot", "0.05", "--price", "4,2.5,2"]
    assert main([*argv, "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    single = plan("llama-3.1-70b", "2x8xH100", rate=5.0, tpot=0.05, price=2.5)
    assert (data[1]["devices"], data[1]["tpot_s"], data[1]["cost_per_million"]) == (single.devices, single.tpot_s, single.cost_per_million)
    assert data[2]["cluster"] == "1xH100" and "does not fit" in data[2]["error"]
    assert main(argv) == 0
    rows = capsys.readouterr().out.splitlines()
    assert "error of them" in rows[0] and "50%, 20%" in rows[2] and "kernels measured" in rows[2] and "the H100's" in rows[1]
    assert rows[0].split()[:3] == ["cluster", "plan", "devices"] and rows[1].startswith("8xH200") and rows[2].startswith("2x8xH100")
    assert ms(single.tpot_s) in rows[2] and rows[2].endswith("yes") and any("does not fit" in row for row in rows)


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--cluster", "8xH100,8xNOPE"], "NOPE"),
        (["--cluster", "8xH100,8xH200", "--plot", "x.svg"], "--plot is of one plan"),
        (["--cluster", "8xH100,8xH200", "--simulate"], "--simulate is of one plan"),
        (["--cluster", "8xH100,8xH200", "--price", "1,2,3"], "--price='1,2,3'"),
        (["--cluster", "8xH100,8xH200", "--rate", "0"], "--rate=0 must be more than 0"),
        (["--price", "free"], "--price='free'"),
        (["--price", "2,x"], "--price='2,x'"),
        (["--margin", "1"], "--margin=1 must be at least 0 and below 1"),
        (["--max-model-len", "100"], "--max-model-len=100 is less than"),
        (["--max-model-len", "999999"], "--max-model-len=999999 is more than the 131072 positions"),
    ],
)
def test_mistakes_name_the_flag(argv, words, capsys):
    assert main(["plan", "llama-3.1-8b", *argv]) == 2
    error = capsys.readouterr().err
    assert words in error and error.count("\n") == 1


def test_where_no_cluster_has_room_the_first_says_why():
    with pytest.raises(ConfigError, match="does not fit on 1x1xH100"):
        compare("llama-3.1-70b", ["1xH100", "1xA100"], [None, None])


def test_costs_are_of_the_devices_and_of_whole_nodes():
    found = plan("llama-3.1-8b", "1x8xH100", rate=1.0, price=2.0, **ASK)
    assert found.devices < 8 and (found.nodes, found.rented) == (1, 8)
    assert (found.per_hour, found.nodes_per_hour) == (2.0 * found.devices, 16.0)
    assert found.cost_per_million == pytest.approx(found.per_hour / 3600 / 300 * 1e6)
    assert found.nodes_per_million == pytest.approx(16.0 / 3600 / 300 * 1e6)
    text = report(found)
    assert "$16.00 an hour for 1 node of 8 devices" in text and found.to_json()["nodes_per_hour"] == 16.0
    whole = report(plan("llama-3.1-8b", "1x8xH100", price=2.0, **ASK))
    assert "$16.00 an hour for 8 devices" in whole and "whole nodes" not in whole
    assert "no price known" in report(plan("llama-3.1-8b", "1x8xH100", **ASK))


@pytest.mark.parametrize(
    ("where", "words"),
    [
        ("H100", ["kernels as measured on H100s", "docs/planner.md#serving"]),
        ("A100", ["products as measured on A100s", "decode attention", "constants of the H100"]),
        ("MI300X", ["no kernel was measured", "products, prefill attention", "constants of the H100"]),
        ("cpu", ["run `lockstep calibrate`"]),
    ],
)
def test_what_the_constants_come_from_is_said_of_each_kind(where, words):
    found = plan("qwen3-0.6b", cluster(where))
    assert all(word in found.basis for word in words) and ("calibrate`" in found.basis) == (where == "cpu")


def test_a_device_like_another_says_whose_constants_it_has(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("device: {like: H100, memory_bandwidth: 4TB/s}\n")
    changed = plan("qwen3-0.6b", str(path))
    assert "no kernel was measured on this device" in changed.basis and "constants of the H100" in changed.basis
    assert changed.constants == "the H100's" and not changed.calibrated
    path.write_text("device: {like: H100, name: Ours, price_per_hour: 3}\n")
    assert "kernels as measured on H100s" in plan("qwen3-0.6b", str(path)).basis
    path.write_text("device: {like: A100, price_per_hour: 3}\n")
    assert "decode attention" in plan("qwen3-0.6b", str(path)).basis.split(";")[1]


def test_servers_that_know_nothing_of_each_other_ask_for_a_load_balancer():
    found = plan("deepseek-v3", "2x8xH200", quantization="fp8", fixed={"ep": 8, "dp": 16})
    servers = sum("--headless" not in c.line for c in found.commands)
    assert servers == 2 and any(f"start {servers} servers" in note and "load balancer" in note for note in found.notes)
    assert not any("load balancer" in note for note in plan("llama-3.1-8b", "2x8xH100").notes), "one server, and replicas that others keep"


def test_a_picture_of_one_token_answers_and_png(tmp_path, capsys, monkeypatch):
    """Nothing streams, so nothing is traded; a .png is drawn by matplotlib, or its absence names the extra."""
    argv = ["plan", "llama-3.1-8b", "--cluster", "8xH100", "--no-draw"]
    assert main([*argv, "--output-len", "1", "--ttft", "1", "--plot", str(tmp_path / "one.svg")]) == 0
    assert ET.fromstring((tmp_path / "one.svg").read_text()).findall(f"{SVG}circle")
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    capsys.readouterr()
    assert main([*argv, "--plot", str(tmp_path / "x.png")]) == 2
    assert "pip install 'lockstep[plot]'" in capsys.readouterr().err


def test_a_png_is_drawn_where_the_plot_extra_is_installed(tmp_path, capsys):
    file = tmp_path / "x.png"
    done = main(["plan", "llama-3.1-8b", "--cluster", "8xH100", "--no-draw", "--plot", str(file), "--tpot", "0.02", "--rate", "5"])
    if find_spec("matplotlib"):
        assert done == 0 and file.read_bytes().startswith(b"\x89PNG\r\n")
    else:
        assert done == 2 and "lockstep[plot]" in capsys.readouterr().err and not file.exists()


def test_longer_requests_are_let_in_where_one_has_room():
    mean, longer = plan("llama-3.1-8b", "1xH100", **ASK), plan("llama-3.1-8b", "1xH100", max_model_len=32768, **ASK)
    assert "--max-model-len 2300 " in mean.commands[0].line and "--max-model-len 32768 " in longer.commands[0].line
    assert "lengths are taken as fixed" in report(mean) and "lengths are taken as fixed" not in report(longer)
    assert (longer.rate, longer.kv_bytes) == (mean.rate, mean.kv_bytes), "the load is that of the mean request"
    with pytest.raises(ConfigError, match=r"does not fit on 1x1xL40S: .* more per rank for one request of 131072 tokens"):
        plan("llama-3.1-8b", "1xL40S", max_model_len=131072, memory_share=0.5, **ASK)
    assert plan("llama-3.1-8b", "1xL40S", memory_share=0.5, **ASK).meets


def test_without_a_rate_the_smallest_load_that_makes_nearly_the_most_is_taken():
    found = plan("llama-3.1-70b", "8xH100", **ASK)
    assert 0.98 * found.admits["both"] <= found.rate < found.admits["both"]
    assert found.limits.max_num_seqs == found.point.concurrency < 1024


def test_lines_fit_a_narrow_terminal_except_commands(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "60")
    argv = [
        "plan",
        "llama-3.1-70b",
        "--cluster",
        "2x8xH100",
        "--rate",
        "30",
        "--ttft",
        "0.5",
        "--tpot",
        "0.05",
        "--explain",
        "--price",
        "2",
    ]
    assert main([*argv, "--simulate"]) == 0
    lines = capsys.readouterr().out.splitlines()
    long = [line for line in lines if len(line) > 60]
    assert len(long) == 2 and all(line.startswith("lockstep serve ") for line in long), "each on a line of its own, to be copied"
    assert [lines[lines.index(line) - 1] for line in long] == ["  node0:", "  node1:"]
    assert main([*argv[:2], "--cluster", "8xH100,8xH200"]) == 0
    assert max(map(len, capsys.readouterr().out.splitlines())) <= 60


def test_text_is_wrapped_at_spaces_and_only_where_asked():
    assert wrapped("  a bb ccc " + "d" * 30, 30, 4).split("\n") == ["  a bb ccc", "    " + "d" * 30]
    assert wrapped("x " * 100, None, 4) == "x " * 100 and ms(0.0123) == "12.3 ms" and ms(1.46) == "1,460 ms" and ms(0.00123) == "1.23 ms"


def test_the_drawing_names_layouts_and_promises(tmp_path):
    marks = [Mark("TP=8", 1, 90.0, 10.0, 0.1), Mark("TP=8", 2, 80.0, 50.0, 0.1), Mark("TP=4", 8, 40.0, 90.0, 0.1)]
    asked = Asked.of(Workload(100, 100, rate=8.0, tpot_s=0.02), devices=10)
    assert (asked.user, asked.device) == (50.0, 80.0) and [m.concurrency for m in changes(marks)] == [1, 8]
    text = as_text(marks, marks[1], asked, width=60)
    rows = text.splitlines()[1:15]
    assert (
        all(row[10 + round(50 / 90 * 59)] == "|" for row in rows)
        and any(row.count("-") > 30 for row in rows)
        and "a  TP=8" in text
        and "b  TP=4" in text
    )
    assert "TPOT 20.0 ms" in text and "8 requests/s on 10 devices" in text
    far = as_text(marks, None, Asked.of(Workload(100, 100, tpot_s=0.0001), 10), width=40)
    assert "beyond the right edge" in far
    root = ET.fromstring(as_svg(marks, marks[1], "a & b", asked))
    words = [element.text for element in root.findall(f"{SVG}text")]
    assert {"TP=8", "TP=4", "this plan: TP=8"} <= set(words) and any("kept to the right" in str(word) for word in words)
    dashed = [p for p in root.findall(f"{SVG}path") if p.get("stroke-dasharray")]
    assert len(dashed) == 2


def test_a_server_on_several_nodes_asks_for_a_key_and_one_on_a_node_listens_to_it_alone():
    one, two = plan("llama-3.1-8b", "8xH100"), plan("llama-3.1-70b", "2x8xH100")
    assert all("--host" not in c.line for c in one.commands)
    assert two.commands[0].line.endswith(' --host 0.0.0.0 --api-key "$LOCKSTEP_API_KEY"') and "--headless" in two.commands[1].line
