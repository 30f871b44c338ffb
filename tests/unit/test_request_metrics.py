"""What requests come to, counted: a known sequence of requests, and what it must give."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from lockstep.cluster.live import Recoveries
from lockstep.frontend import stats_log
from lockstep.frontend.request_metrics import HISTOGRAMS, INCOMPLETE_S, MetricsSnapshot, RequestMetrics
from lockstep.server import metrics_text
from lockstep.server.http_metrics import HttpMetrics
from lockstep.testing.fakes import FakeClock
from lockstep.testing.observed import ObservedClient, output, request

FROZEN = Path(__file__).parents[1] / "contract" / "metrics.txt"
CACHE = {"block_size": 16, "enable_prefix_caching": True, "gpu_memory_utilization": None, "num_gpu_blocks": 100}
PROCESS = ("process_",)  # what the process itself is, from prometheus_client


def metrics() -> tuple[RequestMetrics, FakeClock, ObservedClient]:
    clock, client = FakeClock(100.0), ObservedClient()
    return RequestMetrics(client, clock), clock, client  # type: ignore[arg-type]


def run(
    found: RequestMetrics, clock: FakeClock, name: str, tokens: int, *, reason: str = "length", replica: int = 0, prompt: int = 8
) -> None:
    """A request that waits 0.5 s, takes its first token after 1 s, and 0.1 s for each other."""
    found.added(request(name, prompt, arrival_s=clock()))
    clock.advance(1.0)
    for i in range(tokens):
        last = i == tokens - 1
        more = {"finish_reason": reason} if last else {}
        found.took([output(name, queued_s=0.5 if i == 0 else 0.0, num_cached_tokens=2, replica=replica, **more)])
        clock.advance(0.1)


def rendered(snapshot: MetricsSnapshot, http: HttpMetrics | None = None) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
    """(sample, labels) -> value, of the text."""
    text = metrics_text.render(snapshot, "m", CACHE, list(http.families({"queue": 1, "tokens": 0, "client": 0})) if http else ()).decode()
    return {(s.name, frozenset(s.labels.items())): s.value for f in text_string_to_metric_families(text) for s in f.samples}


def value(samples: dict[tuple[str, frozenset[tuple[str, str]]], float], name: str, **labels: str) -> float:
    found = [v for (n, have), v in samples.items() if n == name and set(labels.items()) <= have]
    assert len(found) == 1, f"{name} {labels}: {len(found)} samples"
    return found[0]


def test_a_known_sequence_of_requests_gives_known_numbers() -> None:
    found, clock, _ = metrics()
    run(found, clock, "a", 5)
    run(found, clock, "b", 3, reason="stop", replica=1, prompt=20)
    found.added(request("c", arrival_s=clock()))
    clock.advance(2.0)
    found.took([output("c", 0, finish_reason="abort")])
    found.took([output("never added", finish_reason="stop")])
    samples = rendered(found.snapshot())
    for prefix in ("lockstep:", "vllm:"):
        assert value(samples, f"{prefix}prompt_tokens_total", engine="0") == 8
        assert value(samples, f"{prefix}prompt_tokens_total", engine="1") == 20
        assert value(samples, f"{prefix}prompt_tokens_cached_total", engine="1") == 2
        assert value(samples, f"{prefix}prompt_tokens_by_source_total", engine="1", source="local_compute") == 18
        assert value(samples, f"{prefix}generation_tokens_total", engine="0") == 5
        assert value(samples, f"{prefix}generation_tokens_total", engine="1") == 3
        ends = {
            reason: value(samples, f"{prefix}request_success_total", engine="0", finished_reason=reason)
            for reason in ("length", "abort", "stop")
        }
        assert ends == {"length": 1, "abort": 1, "stop": 0}
        assert value(samples, f"{prefix}time_to_first_token_seconds_sum", engine="0") == pytest.approx(1.0)
        assert value(samples, f"{prefix}inter_token_latency_seconds_sum", engine="0") == pytest.approx(0.4)
        assert value(samples, f"{prefix}inter_token_latency_seconds_count", engine="0") == 4
        assert value(samples, f"{prefix}request_time_per_output_token_seconds_sum", engine="1") == pytest.approx(0.1)
        assert value(samples, f"{prefix}e2e_request_latency_seconds_sum", engine="0") == pytest.approx(1.4 + 2.0)
        assert value(samples, f"{prefix}request_queue_time_seconds_sum", engine="0") == pytest.approx(0.5)
        assert value(samples, f"{prefix}request_prefill_time_seconds_sum", engine="0") == pytest.approx(0.5)
        assert value(samples, f"{prefix}request_decode_time_seconds_sum", engine="0") == pytest.approx(0.4)
        assert value(samples, f"{prefix}request_inference_time_seconds_sum", engine="0") == pytest.approx(0.9)
        assert value(samples, f"{prefix}num_requests_running", engine="0") == 1
        assert value(samples, f"{prefix}num_requests_waiting", engine="1") == 2
        assert value(samples, f"{prefix}kv_cache_usage_perc", engine="0") == 0.25
        assert value(samples, f"{prefix}prefix_cache_hits_total", engine="0") == 4
        assert value(samples, f"{prefix}num_preemptions_total", engine="0") == 1
        assert value(samples, f"{prefix}engine_sleep_state", engine="0", sleep_state="awake") == 1
        assert value(samples, f"{prefix}cache_config_info", engine="0", block_size="16", num_gpu_blocks="100") == 1


@pytest.mark.parametrize("count", [1, 7])
def test_every_histogram_of_requests_counts_each_request_once(count: int) -> None:
    found, clock, _ = metrics()
    for i in range(count):
        run(found, clock, str(i), 2 + i)
    samples = rendered(found.snapshot())
    for name in HISTOGRAMS:
        expected = sum(1 + i for i in range(count)) if name == "inter_token_latency_seconds" else count
        assert value(samples, f"vllm:{name}_count", engine="0") == expected, name
        assert value(samples, f"vllm:{name}_bucket", engine="0", le="+Inf") == expected


def test_completions_of_one_request_are_one_request_where_that_is_asked() -> None:
    found, clock, _ = metrics()
    for choice, tokens in enumerate((2, 5, 3)):
        found.added(request(f"a.{choice}", n=3, choice=choice, arrival_s=clock()))
        found.took([output(f"a.{choice}", tokens, finish_reason="length")])
    samples = rendered(found.snapshot())
    assert value(samples, "lockstep:request_params_n_count", engine="0") == 1
    assert value(samples, "lockstep:request_params_n_sum", engine="0") == 3
    assert value(samples, "lockstep:request_max_num_generation_tokens_count", engine="0") == 1
    assert value(samples, "lockstep:request_max_num_generation_tokens_sum", engine="0") == 5
    assert value(samples, "lockstep:request_generation_tokens_count", engine="0") == 3


def test_recoveries_are_counted_once_however_often_they_are_read() -> None:
    found, _, client = metrics()
    client.losses = Recoveries([0.4, 0.6], [2.0])
    found.snapshot()
    samples = rendered(found.snapshot())
    assert value(samples, "lockstep:request_recovery_seconds_count") == 2
    assert value(samples, "lockstep:request_recovery_seconds_sum") == pytest.approx(1.0)
    assert value(samples, "lockstep:replica_recovery_seconds_count") == 1


def test_ranks_are_told_with_their_places() -> None:
    found, _, _ = metrics()
    samples = rendered(found.snapshot())
    assert value(samples, "lockstep:rank_steps_total", engine="1", rank="1", tp="1", pp="0") == 30
    assert value(samples, "lockstep:rank_step_seconds_total", engine="0", rank="0") == pytest.approx(0.6)
    assert value(samples, "lockstep:rank_heartbeat_age_seconds", engine="0", rank="1") == pytest.approx(0.6)
    assert value(samples, "lockstep:rank_collective_seconds_total", engine="0", rank="0", collective="tp:0.all_gather") == 0.02
    assert value(samples, "lockstep:replica_restarts_total", engine="1") == 1
    assert value(samples, "lockstep:step_seconds_count", engine="0") == 30


def test_names_types_and_labels_are_those_of_the_committed_list() -> None:
    found, _, _ = metrics()
    http = HttpMetrics()
    http.answered("/health", "GET", 200, 0.01)
    text = metrics_text.render(found.snapshot(), "m", CACHE, list(http.families({"queue": 1, "tokens": 0, "client": 0}))).decode()
    rows = []
    for family in text_string_to_metric_families(text):
        if not family.name.startswith(PROCESS):
            labels = sorted({label for sample in family.samples for label in sample.labels} - {"le"})
            rows.append(f"{family.name} {family.type} {','.join(labels)}")
    listed = [line for line in FROZEN.read_text().splitlines() if line and not line.startswith("#")]
    assert sorted(rows) == listed, f"changed on purpose? then change {FROZEN.name} too"


def test_percentiles_of_the_latest_tokens() -> None:
    found, clock, _ = metrics()
    assert found.cluster()["totals"]["ttft_ms"] is None
    run(found, clock, "a", 11)
    totals = found.cluster()["totals"]
    assert totals["ttft_ms"]["p50"] == pytest.approx(1000.0) and totals["itl_ms"]["p99"] == pytest.approx(100.0)
    assert totals["requests"] == 1 and totals["running"] == 2 and totals["kv_usage"] == 0.25


def test_a_line_every_ten_seconds_with_work(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logging.getLogger("lockstep"), "propagate", True)
    caplog.set_level(logging.INFO, logger="lockstep")
    found, clock, client = metrics()
    client.live = list  # type: ignore[method-assign]
    run(found, clock, "a", 5)
    assert not caplog.records
    clock.advance(stats_log.EVERY_S)
    found.took([])
    (line,) = {r.getMessage() for r in caplog.records}
    assert line.startswith("Avg prompt throughput: 0.7 tokens/s, Avg generation throughput: 0.4 tokens/s, Running: 0 reqs, Waiting: 0 reqs")
    clock.advance(stats_log.EVERY_S)
    found.took([])
    assert len({r.getMessage() for r in caplog.records}) == 1, "there was no work"


def test_a_request_that_goes_on_in_another_engine_is_not_counted_anew() -> None:
    found, clock, _ = metrics()
    arrived_s = clock() - 9.0
    resumed = request("a", arrival_s=arrived_s)
    resumed.output_token_ids = [7] * 4
    found.added(resumed)
    clock.advance(1.0)
    for more in ({}, {"finish_reason": "length"}):
        found.took([output("a", **more)])
        clock.advance(0.1)
    samples = rendered(found.snapshot())
    assert value(samples, "lockstep:time_to_first_token_seconds_count", engine="0") == 0
    assert value(samples, "lockstep:prompt_tokens_total", engine="0") == 0
    assert value(samples, "lockstep:generation_tokens_total", engine="0") == 2, "the others were counted by the former one"
    assert value(samples, "lockstep:inter_token_latency_seconds_sum", engine="0") == pytest.approx(0.1)
    assert value(samples, "lockstep:request_generation_tokens_sum", engine="0") == 6
    assert value(samples, "lockstep:e2e_request_latency_seconds_sum", engine="0") == pytest.approx(10.1)


def test_what_is_left_of_a_request_of_several_completions_is_counted_and_forgotten() -> None:
    """The others ended before the engine's process was replaced."""
    found, clock, _ = metrics()
    for choice in (1, 2):
        found.added(request(f"a.{choice}", n=3, choice=choice, arrival_s=clock()))
    for choice in (1, 2):
        found.took([output(f"a.{choice}", choice + 1, finish_reason="length")])
    for _ in range(2):
        clock.advance(INCOMPLETE_S)
        found.took([])
    samples = rendered(found.snapshot())
    assert value(samples, "lockstep:request_max_num_generation_tokens_count", engine="0") == 1
    assert value(samples, "lockstep:request_max_num_generation_tokens_sum", engine="0") == 3
    assert not found._families, "it leaks"


def test_restarts_of_the_engine_are_exported() -> None:
    found = RequestMetrics(ObservedClient(), FakeClock(100.0), restarts=3)  # type: ignore[arg-type]
    assert value(rendered(found.snapshot()), "lockstep:engine_restarts_total") == 3
