"""Plans for a calibrated machine: its own steps, its own memory, its ranks together on it, and commands that its engine takes."""

from __future__ import annotations

import json
import shlex
from dataclasses import asdict, replace
from pathlib import Path
from statistics import mean

import msgspec
import pytest

from lockstep.cli.flags import parse
from lockstep.config.errors import ConfigError
from lockstep.config.model_spec import ModelSpec
from lockstep.config.serve import ServeOptions
from lockstep.config.validate import check_values
from lockstep.planner import calibration, cpu_memory, plan
from lockstep.planner.answer import Plan, pricer_of, search_of
from lockstep.planner.calibration import MEASURED, AttentionRates, Calibration, Line, Mode, ProductRates
from lockstep.planner.catalogue import cluster
from lockstep.planner.cpu import CpuModel
from lockstep.planner.hardware import ZERO_CALIBRATION, make_cluster
from lockstep.planner.host import CLOSE, ENGINE_ONLY, ROUGH, SCHEDULED, SHORT, HostPricer, rows_of
from lockstep.planner.layer import Work
from lockstep.planner.layout import Layout
from lockstep.planner.load import Serving, Workload
from lockstep.planner.memory import LIBRARY_BYTES
from lockstep.planner.model import from_spec
from lockstep.planner.terms import total_s
from lockstep.simulation.planned import simulate_plan

SPEC = ModelSpec("LlamaForCausalLM", 256, 6, 8, 4, 32, 768, 8000, 4096, layer_kinds=("full",) * 6, dtype="bfloat16")
SHAPE = from_spec(SPEC, "small")
SPLITS = {Layout(), Layout(tp=2), Layout(pp=2), Layout(dp=2)}


def mode(ranks: int, slower: float = 1.0, row: float = 1.0, **more: object) -> Mode:
    """A rank of one alone takes 1 ns for a weight; one of two 2 ns, `slower` times. row: what each further row adds, of the first."""
    rates = [ProductRates(r, 1e-6, 0.0, [(1e6, slower * ranks * 1e-9 * (1 + row * (r - 1)))], 0.0, 0.0) for r in (1, 8, 64, 512)]
    flat, line = AttentionRates(1e-6, 1e-10, 1e-12, 0.0), Line(1e-6)
    common = {"rope": line, "angles": line, "embed": line, "norm": line, "choose": line, "step": Line(1e-4)}
    return Mode(
        ranks=ranks,
        busy=ranks,
        threads=2 // ranks,
        bandwidth=1e10,
        flops=1e11,
        products=rates,
        decode=flat,
        prefill=flat,
        **common,
        **more,
    )


def entry(tmp_path: Path, *modes: Mode, capacity: int = 1 << 30) -> str:
    """The file of a calibrated machine."""
    found = Calibration(
        name="here", machine="a test", cores=2, kernels="avx512", dtype="bfloat16", capacity_bytes=capacity, memory_bandwidth=2e10,
        cache_bytes=1 << 40, flops={"bfloat16": 1e12}, all_reduce=[(256, 2e-6), (1 << 20, 1e-4)], send_recv=[(256, 3e-6), (1 << 20, 8e-5)],
        modes=list(modes),
    )  # fmt: skip
    path = tmp_path / "here.json"
    calibration.save(found, path)
    return str(path)


def test_it_is_calibrated_and_its_terms_are_the_machine_s_steps(tmp_path: Path):
    where = entry(tmp_path, mode(1), mode(2, combine=Line(1e-6)))
    pricer = pricer_of(SHAPE, where)
    assert isinstance(pricer, HostPricer)
    for layout in SPLITS:
        for work in (Work(True, 8, 100.0), Work(False, 64, 32.0)):
            rows = ([1] * 8, [101] * 8, 8) if work.decode else ([64], [96], 1)
            model = CpuModel(pricer.found, SHAPE, layout, how="even")
            assert pricer.step(layout, work).sum_s == pytest.approx(sum(model.stage_s(*rows)) + model.hop_s(work.tokens))
            assert total_s(pricer.terms(layout, work)) == pytest.approx(pricer.step(layout, work).sum_s)
    found = plan(SHAPE, where, input_len=64, output_len=32)
    assert found.calibrated and found.devices == 1
    assert found.considered == len(SPLITS)
    assert {found.layout, *(runner.layout for runner in found.runners)} <= SPLITS
    assert found.runners and not any("nodes" in runner.reason for runner in found.runners)


@pytest.mark.parametrize("layers", [1, 6])
def test_the_last_layer_is_priced_for_what_is_sampled(layers: int, tmp_path: Path):
    """After its attention: its products, and its sums over the ranks. As if all were sampled, it would be one of its kind."""
    tokens, hidden, combine = 64, SPEC.hidden_size, Line(1e-6, 1e-9)
    calibrated = calibration.load(Path(entry(tmp_path, mode(1), mode(2, combine=combine))))
    shape = from_spec(replace(SPEC, num_layers=layers, layer_kinds=("full",) * layers), "small")
    model = CpuModel(calibrated, shape, Layout(tp=2), how="even")

    def seconds(count: int, sampled: int) -> dict[str, float]:
        return {op.name: op.seconds for op in model.operations(0, [count], [96], sampled)}

    whole, narrow, one = seconds(tokens, tokens), seconds(tokens, 1), seconds(1, 1)
    for name in ("out", "gate and up", "down"):
        assert narrow[name] == pytest.approx((layers - 1) / layers * whole[name] + one[name] / layers), name
        assert narrow[name] < whole[name]
    assert narrow["qkv"] == whole["qkv"]
    assert narrow["sums over the ranks"] == pytest.approx(2 * (layers - 1) * combine.at(tokens * hidden) + 2 * combine.at(hidden))


def test_stages_before_the_last_compute_every_token(tmp_path: Path):
    model = CpuModel(calibration.load(Path(entry(tmp_path, mode(1), mode(2, combine=Line(1e-6))))), SHAPE, Layout(pp=2), how="even")
    few, whole = model.stage_s([64], [96], 1), model.stage_s([64], [96], 64)
    assert few[0] == whole[0] and few[1] < whole[1]


def test_the_engine_s_own_term_says_all_that_is_in_it(tmp_path: Path):
    """A prompt that begins, and its tokens, cost the engine something of their own."""
    pricer = pricer_of(SHAPE, entry(tmp_path, mode(1, prompt_s=1e-3, prompt_token_s=1e-5)))
    term = next(t for t in pricer.terms(Layout(), Work(False, 64, 0.0, 2)) if t.name == "engine, executor and worker")
    assert term.seconds == pytest.approx(1e-4 + 2 * 1e-3 + 62 * 1e-5), "each prompt's last token is its request's row"
    assert term.formula == "base + per request + per prompt that begins + per prompt token"


def test_ranks_that_pay_win_and_ranks_that_do_not_lose(tmp_path: Path):
    """Two ranks that are as fast together as one alone add nothing but sums; twice as fast, they carry more."""
    ask = {"input_len": 64, "output_len": 32}
    assert plan(SHAPE, entry(tmp_path, mode(1), mode(2, slower=1.5)), **ask).layout == Layout()
    assert plan(SHAPE, entry(tmp_path, mode(1), mode(2, slower=0.5)), **ask).layout.devices == 2


def test_memory_is_that_of_the_machine_and_shared_by_its_ranks(tmp_path: Path):
    where = entry(tmp_path, mode(1), mode(2))
    found = plan(SHAPE, where, input_len=64, output_len=32, fixed={"tp": 2, "pp": 1, "dp": 1})
    layout = Layout(tp=2)
    assert found.memory.weights == max(cpu_memory.weight_bytes(SHAPE, layout, 0, rank, how="even") for rank in (0, 1))
    assert found.memory.buffers == cpu_memory.exchange_bytes(layout) + LIBRARY_BYTES
    assert found.kv_room == int(0.9 * (1 << 30)) // 2 - found.memory.fixed
    tight = entry(tmp_path, mode(1), mode(2, slower=0.5), capacity=150 << 20)
    assert plan(SHAPE, tight, input_len=64, output_len=32).layout.dp == 1, "two whole models have no room"
    with pytest.raises(ConfigError, match=r"does not fit on 1x1xhere: .* needs .* more per rank"):
        plan(SHAPE, entry(tmp_path, mode(1), mode(2), capacity=1 << 25), input_len=64, output_len=32)


@pytest.mark.parametrize("layout", sorted(SPLITS), ids=str)
def test_its_command_is_parsed_and_simulated(layout: Layout, tmp_path: Path):
    where = entry(tmp_path, mode(1), mode(2))
    found = plan(SHAPE, where, input_len=64, output_len=32, fixed={"tp": layout.tp, "pp": layout.pp, "dp": layout.dp})
    (command,) = found.commands
    words = shlex.split(command.line)
    config = parse("serve", words[2:], ServeOptions, max_tokens=None, description="", sampling=False).config
    check_values(config)
    parallel = config.parallel
    assert (parallel.tensor_parallel_size, parallel.pipeline_parallel_size) == (layout.tp, layout.pp)
    assert parallel.data_parallel_size == layout.dp
    ended = simulate_plan(found, pricer_of(SHAPE, where)).window.ended
    assert all(len(request.token_s) == 32 for request in ended) and ended


def test_more_replicas_than_there_is_room_for_are_refused(tmp_path: Path):
    with pytest.raises(ConfigError, match="dp=3"):
        plan(SHAPE, entry(tmp_path, mode(1), mode(2)), input_len=64, output_len=32, fixed={"dp": 3})


def test_what_was_not_measured_is_priced_as_any_device(tmp_path: Path):
    where = cluster(entry(tmp_path, mode(1), mode(2)))
    assert not isinstance(pricer_of(SHAPE, make_cluster(where.device, 2, 1)), HostPricer), "two machines"
    assert not isinstance(pricer_of(replace(SHAPE, dtype="float32"), where), HostPricer), "another type"
    assert not isinstance(pricer_of("mixtral-8x7b", where), HostPricer), "a model that the engine does not run"


def test_an_answer_says_that_something_else_used_the_machine(tmp_path: Path):
    quiet, busy = mode(1), msgspec.structs.replace(mode(1), disturbed=1.27)
    for found, said in ((quiet, False), (busy, True)):
        own = plan(SHAPE, cluster(entry(tmp_path, found)), input_len=64, output_len=32)
        assert any("something else made steps of the usual round x1.27 as long" in note for note in own.notes) is said


def test_an_answer_that_is_not_of_the_machine_s_steps_is_not_calibrated(tmp_path: Path):
    where = cluster(entry(tmp_path, mode(1), mode(2)))
    own = plan(SHAPE, where, input_len=64, output_len=32, ttft=100)
    assert own.calibrated and own.band == pytest.approx(asdict(MEASURED)) and own.promises[0].error == MEASURED.ttft
    assert ENGINE_ONLY in own.notes, "the printed command serves over HTTP"
    for other in (
        plan(SHAPE, make_cluster(where.device, 2, 1), input_len=64, output_len=32, ttft=100),
        plan(SHAPE, where, input_len=64, output_len=32, ttft=100, quantization="fp8"),
        plan(SHAPE, where, input_len=64, output_len=32, ttft=100, quantization="fp8", serving=Serving(calibrated=True)),
    ):
        assert not other.calibrated and "not calibrated for this model" in other.basis and ENGINE_ONLY not in other.notes
        assert (other.band["ttft"], other.band["tpot"]) == (ZERO_CALIBRATION.ttft, ZERO_CALIBRATION.tpot)
        assert other.promises[0].error == ZERO_CALIBRATION.ttft


def test_prompts_that_share_a_step_are_rows_of_their_own(tmp_path: Path):
    assert rows_of(Work(False, 512, 0.0, 8)) == ([64] * 8, [64] * 8)
    assert rows_of(Work(False, 96, 32.0)) == ([96], [128])
    assert rows_of(Work(False, 5, 2.0, 2)) == ([3, 2], [5, 4])
    pricer = pricer_of(SHAPE, entry(tmp_path, mode(1), mode(2)))
    together = pricer.step(Layout(), Work(False, 512, 0.0, 8)).sum_s
    model = CpuModel(pricer.found, SHAPE, Layout(), how="even")
    assert together == pytest.approx(sum(model.stage_s([64] * 8, [64] * 8, 8)))
    attention = [
        next(t.seconds for t in pricer.terms(Layout(), Work(False, 512, 0.0, prompts)) if t.name == "attention") for prompts in (1, 8)
    ]
    assert attention[1] < attention[0], "each attends to its own tokens alone"


def test_a_calibration_of_another_version_is_named(tmp_path: Path):
    where = Path(entry(tmp_path, mode(1), mode(2)))
    raw = json.loads(where.read_bytes())
    where.write_bytes(msgspec.json.encode({**raw, "engine": {**raw["engine"], "format": 99}}))
    with pytest.raises(ConfigError, match=r"format 99.*lockstep calibrate"):
        plan(SHAPE, str(where), input_len=64, output_len=32)


def simulated(found: Plan, where: str) -> tuple[float, float, float, float]:
    """How far the mean TTFT and TPOT of the analytic answer are off the scheduler's, of these, and what the answer says."""
    window = simulate_plan(found, pricer_of(SHAPE, where)).window
    first = [r.ttft_s for r in window.requests if r.token_s and window.since_s < r.token_s[0] <= window.until_s]
    each = [r.tpot_s for r in window.ended if r.tpot_s is not None]
    ttft, tpot = (abs(said / mean(times) - 1) for said, times in ((found.ttft_s, first), (found.tpot_s, each)))
    return ttft, tpot, found.band["ttft"], found.band["tpot"]


ROW = 0.1  # weights are read once for all rows: most of a step of few
LENGTHS = [(32, 2), (100, 16), (256, 2), (256, 4), (256, 64), (700, 8)]


@pytest.mark.parametrize("layout", [Layout(), pytest.param(Layout(tp=2), marks=pytest.mark.full)], ids=str)
def test_the_answer_and_the_scheduler_agree_over_lengths(layout: Layout, tmp_path: Path):
    """Clients that ask again, answers of a few tokens too: most steps are of prompts then, and a part of the clients waits."""
    where = entry(tmp_path, mode(1, row=ROW), mode(2, slower=0.6, row=ROW, combine=Line(1e-6)))
    errors = []
    for input_len, output_len in LENGTHS:
        found = plan(SHAPE, where, input_len=input_len, output_len=output_len, fixed={"tp": layout.tp, "pp": 1, "dp": 1})
        ttft, tpot, said_ttft, said_tpot = simulated(found, where)
        assert (said_ttft, said_tpot) == (MEASURED.ttft, MEASURED.tpot) and SCHEDULED not in found.notes
        assert max(ttft, tpot) < 0.35, (input_len, output_len, found.point)  # a few clients fall into step with each other
        errors += [ttft, tpot]
    assert mean(errors) < 0.12


AT_A_RATE = [(100, 4), (256, 16), (256, 128)], (0.25, 0.5, 0.9)
ALL_AT_A_RATE = [(i, o) for i in (32, 100, 256, 700) for o in (2, 4, 8, 16, 32, 63, 64, 128)], (0.1, 0.3, 0.5, 0.7, 0.9)


@pytest.mark.parametrize(
    ("lengths", "shares"),
    [AT_A_RATE, pytest.param(*ALL_AT_A_RATE, marks=[pytest.mark.full, pytest.mark.timeout(3000)])],
    ids=["some", "all"],
)
def test_at_a_rate_the_mean_error_is_within_what_is_said(lengths: list[tuple[int, int]], shares: tuple[float, ...], tmp_path: Path):
    """Over lengths, and shares of the rate that can be carried: short answers and nearly full machines are rough, and say so."""
    where, fixed = entry(tmp_path, mode(1, row=ROW), mode(2, row=ROW)), {"tp": 1, "pp": 1, "dp": 1}
    errors: dict[bool, list[tuple[float, float, float, float]]] = {False: [], True: []}
    for input_len, output_len in lengths:
        most = plan(SHAPE, where, input_len=input_len, output_len=output_len, fixed=fixed).admits["both"]
        for share in shares:
            found = plan(SHAPE, where, input_len=input_len, output_len=output_len, fixed=fixed, rate=most * share)
            rough = output_len < SHORT or share > CLOSE
            errors[rough].append(simulated(found, where))
            assert (SCHEDULED in found.notes) is rough, (input_len, output_len, share)
    for rough, said in ((False, MEASURED), (True, ROUGH)):
        ttft, tpot, said_ttft, said_tpot = (mean(column) for column in zip(*errors[rough], strict=True))
        assert (said_ttft, said_tpot) == pytest.approx((said.ttft, said.tpot))
        assert ttft < said_ttft and tpot < said_tpot, (rough, ttft, tpot)


def test_stages_say_that_they_are_rough(tmp_path: Path):
    where = entry(tmp_path, mode(1, row=ROW), mode(2, row=ROW))
    for input_len, output_len in ((32, 4), (256, 16)):
        found = plan(SHAPE, where, input_len=input_len, output_len=output_len, fixed={"tp": 1, "pp": 2, "dp": 1})
        ttft, tpot, said_ttft, said_tpot = simulated(found, where)
        assert ttft < said_ttft and tpot < said_tpot and said_tpot > MEASURED.tpot and SCHEDULED in found.notes


def test_waiting_clients_are_not_in_steps(tmp_path: Path):
    """One client waits for nobody; of many with answers of two tokens a third does; terms are the whole time."""
    search = search_of(pricer_of(SHAPE, entry(tmp_path, mode(1), mode(2))), Workload(64, 2))
    replica = search.replica(Layout(), 512)
    one, many = replica.at(1), replica.at(12)
    assert one.tpot_s == pytest.approx(replica.pricer.step(Layout(), Work(True, 1, 65.0)).sum_s)
    assert replica.chunks_per_step(12) == pytest.approx(12 / 3, rel=0.1)
    assert many.ttft_s == pytest.approx(2 * many.tpot_s, rel=0.15)
    assert total_s(replica.ttft_terms(12)) == pytest.approx(many.ttft_s) and total_s(replica.tpot_terms(12)) == pytest.approx(many.tpot_s)
    full = search.replica(Layout(), 64).at(30)  # one prompt a step, and 30 clients
    assert full.rate == pytest.approx(30 / (full.ttft_s + full.tpot_s)) and full.ttft_s > 10 * full.tpot_s
    fresh = replica.with_serving(replace(search.serving, step_overhead_s=1.0)).at(12)
    assert fresh.tpot_s > 1.0
