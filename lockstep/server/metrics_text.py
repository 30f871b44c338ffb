"""Prometheus text from the engine's snapshot. The names here are a promise: dashboards and autoscalers read them.

Each family of the tables is there as `lockstep:NAME`; those that the field knows are also there as `vllm:NAME`, with the same
labels and numbers. Counters end in `_total` in the text.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from lockstep.cluster.live import RankNow, ReplicaNow
from lockstep.engine.stats import EngineStats, StepTotals
from lockstep.frontend.request_metrics import HISTOGRAMS, EngineNumbers, MetricsSnapshot
from lockstep.observability.histogram import Histogram
from lockstep.protocol import RankLive

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
OURS, FIELD = "lockstep:", "vllm:"
NOTHING = EngineStats(**dict.fromkeys(EngineStats.__struct_fields__, 0) | {"kv_blocks": 1})

# name: help, value. All with the field's alias.
GAUGES: dict[str, tuple[str, Callable[[EngineStats], float]]] = {
    "num_requests_running": ("Requests that run now.", lambda s: s.running),
    "num_requests_waiting": ("Requests that wait to run.", lambda s: s.waiting),
    "kv_cache_usage_perc": ("Share of the KV cache's blocks in use, 0 to 1.", lambda s: s.kv_usage),
}
COUNTERS: dict[str, tuple[str, Callable[[EngineStats], float]]] = {
    "prefix_cache_queries": ("Prompt tokens looked up in the prefix cache.", lambda s: s.prefix_query_tokens),
    "prefix_cache_hits": ("Of them, tokens found there.", lambda s: s.prefix_hit_tokens),
    "num_preemptions": ("Requests that lost their blocks and began again.", lambda s: s.preemptions),
}
TOKENS: dict[str, tuple[str, Callable[[EngineNumbers], float]]] = {
    "prompt_tokens": ("Prompt tokens of requests that came to a first token.", lambda n: n.prompt_tokens),
    "prompt_tokens_cached": ("Of them, tokens that the prefix cache spared.", lambda n: n.cached_tokens),
    "generation_tokens": ("Tokens generated.", lambda n: n.generation_tokens),
}
HELP = {
    "time_to_first_token_seconds": "From a request's arrival to its first token.",
    "inter_token_latency_seconds": "Between a token and the one before.",
    "request_time_per_output_token_seconds": "A request's mean time for each token after the first.",
    "e2e_request_latency_seconds": "From a request's arrival to its end.",
    "request_queue_time_seconds": "How long a request waited in the engine before it first ran.",
    "request_prefill_time_seconds": "From when a request first ran to its first token.",
    "request_decode_time_seconds": "From a request's first token to its last.",
    "request_inference_time_seconds": "From when a request first ran to its last token.",
    "request_prompt_tokens": "Tokens of a request's prompt.",
    "request_generation_tokens": "Tokens generated for a request.",
    "request_max_num_generation_tokens": "Tokens of the longest completion of a request.",
    "request_prefill_kv_computed_tokens": "Prompt tokens of a request that the prefix cache did not spare.",
    "request_params_n": "Completions that a request asked for.",
    "request_params_max_tokens": "max_tokens of a request; 0: none was given.",
    "request_num_preemptions": "How often a request lost its blocks.",
}
# Those that only lockstep has. Steps of an engine:
STEPS: dict[str, tuple[str, Callable[[StepTotals], float]]] = {
    "engine_busy_seconds": ("Time in which a step was under way.", lambda t: t.busy_s),
    "step_predictions": ("Steps whose time was predicted (a line fitted to the steps before).", lambda t: t.predicted),
    "step_predicted_seconds": ("What these steps were predicted to take, added up.", lambda t: t.predicted_s),
    "step_measured_seconds": ("What the same steps took, added up.", lambda t: t.measured_s),
    "step_prediction_error_seconds": ("By how much each prediction was off, either way, added up.", lambda t: t.error_s),
}
# Ranks: what they came to, ...
RANK_COUNTERS: dict[str, tuple[str, Callable[[RankLive], float]]] = {
    "rank_steps": ("Steps that the rank ran.", lambda r: r.steps),
    "rank_step_seconds": ("Seconds in steps.", lambda r: r.step_s),
    "rank_wait_seconds": ("Of that, waiting for ranks of its stage that came later: the slow rank waits least.", lambda r: r.wait_s),
    "rank_stage_wait_seconds": ("Of that, waiting for another pipeline stage.", lambda r: r.stage_wait_s),
}
# ... and how they are.
RANK_GAUGES: dict[str, tuple[str, Callable[[RankNow], float | None]]] = {
    "rank_step_time_seconds": ("Mean time of the latest steps.", lambda r: r.step_ms / 1e3),
    "rank_wait_time_seconds": ("Of that, waiting for ranks of its stage that came later.", lambda r: r.wait_ms / 1e3),
    "rank_bubble_fraction": ("Share of the engine's busy time in which the rank idled, or waited for another stage.", lambda r: r.bubble),
    "rank_memory_bytes": ("Resident memory of the rank, on a GPU device memory in use.", lambda r: r.memory_bytes),
    "rank_heartbeat_age_seconds": ("Since the rank's last sign of life.", lambda r: r.heartbeat_age_s),
    "rank_slow": ("1: the others wait for this rank.", lambda r: float(r.slow)),
}
COLLECTIVES = {
    "rank_collectives": "Collectives that the rank took part in, by name; layers: those inside the kernels, once a step.",
    "rank_collective_seconds": "Seconds in them; of layers, seconds waited.",
}
SLEEP_STATES = ("awake", "weights_offloaded", "discard_all")


def render(snapshot: MetricsSnapshot, model: str, cache: dict[str, Any], more: Iterable[Metric] = ()) -> bytes:
    """The text. model: as responses name it. cache: the settings of the KV cache. more: what this process counts itself."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Fixed([*families(snapshot, model, cache), *more]))
    return generate_latest(registry)


class _Fixed(Collector):
    """Metrics that are known already."""

    def __init__(self, metrics: list[Metric]) -> None:
        self._metrics = metrics

    def collect(self) -> Iterator[Metric]:
        yield from self._metrics


def families(snapshot: MetricsSnapshot, model: str, cache: dict[str, Any]) -> Iterator[Metric]:
    """Every family, under every name it has."""
    only = min(snapshot.engines, default=0)
    engines = {one.replica: one for one in snapshot.replicas} or {only: ReplicaNow(replica=only, state="ready")}
    numbers = {engine: snapshot.engines.get(engine) or EngineNumbers.empty() for engine in sorted(engines.keys() | snapshot.engines.keys())}
    labels = {engine: (model, str(engine)) for engine in numbers}
    stats = {engine: engines[engine].stats or NOTHING for engine in engines}
    steps = {engine: engines[engine].steps or StepTotals.empty() for engine in engines}

    for both in (OURS, FIELD):
        yield from _plain(both, GaugeMetricFamily, GAUGES, stats, labels)
        yield from _plain(both, CounterMetricFamily, COUNTERS, stats, labels)
        yield from _plain(both, CounterMetricFamily, TOKENS, numbers, labels)
        yield from _by_reason(both, numbers, stats, labels)
        for name in HISTOGRAMS:
            found = {engine: one.histograms[name] for engine, one in numbers.items()}
            yield _histogram(both + name, HELP[name], found, labels)
        yield _histogram(f"{both}iteration_tokens_total", "Tokens computed in a step.", {e: t.tokens for e, t in steps.items()}, labels)
        yield _info(both, model, cache, engines)
        yield _sleep(both, snapshot.sleep_level, labels)
    yield _histogram(f"{OURS}step_seconds", "Time that a step added.", {e: t.seconds for e, t in steps.items()}, labels)
    yield from _plain(OURS, CounterMetricFamily, STEPS, steps, labels)
    yield from _replicas(engines, labels)
    restarts = CounterMetricFamily(f"{OURS}engine_restarts", "Starts of the engine's process beyond the first.", labels=["model_name"])
    restarts.add_metric([model], snapshot.engine_restarts)
    yield restarts
    for name, recovery, text in (
        ("request_recovery_seconds", snapshot.request_recovery, "From the loss of a request's replica to its next token."),
        ("replica_recovery_seconds", snapshot.replica_recovery, "From the loss of a replica to its return."),
    ):
        family = HistogramMetricFamily(OURS + name, text, labels=["model_name"])
        family.add_metric([model], recovery.cumulative(), recovery.total)
        yield family
    yield from _ranks(engines, model)


def _plain(
    prefix: str, kind: Any, table: dict[str, tuple[str, Callable[[Any], float]]], values: dict[int, Any], labels: dict[int, tuple[str, str]]
) -> Iterator[Metric]:
    for name, (text, value) in table.items():
        family = kind(prefix + name, text, labels=["model_name", "engine"])
        for engine, one in values.items():
            family.add_metric(labels[engine], value(one))
        yield family


def _histogram(name: str, text: str, found: dict[int, Histogram], labels: dict[int, tuple[str, str]]) -> Metric:
    family = HistogramMetricFamily(name, text, labels=["model_name", "engine"])
    for engine, one in found.items():
        family.add_metric(labels[engine], one.cumulative(), one.total)
    return family


def _by_reason(
    prefix: str, numbers: dict[int, EngineNumbers], stats: dict[int, EngineStats], labels: dict[int, tuple[str, str]]
) -> Iterator[Metric]:
    success = CounterMetricFamily(f"{prefix}request_success", "Requests that ended.", labels=["model_name", "engine", "finished_reason"])
    source = CounterMetricFamily(f"{prefix}prompt_tokens_by_source", "Prompt tokens.", labels=["model_name", "engine", "source"])
    for engine, one in numbers.items():
        for reason, count in one.finished.items():
            success.add_metric([*labels[engine], reason], count)
        source.add_metric([*labels[engine], "local_compute"], one.prompt_tokens - one.cached_tokens)
        source.add_metric([*labels[engine], "local_cache_hit"], one.cached_tokens)
    waiting = GaugeMetricFamily(
        f"{prefix}num_requests_waiting_by_reason", "Requests that wait to run.", labels=["model_name", "engine", "reason"]
    )
    for engine, s in stats.items():
        waiting.add_metric([*labels[engine], "capacity"], s.waiting)
    yield from (success, source, waiting)


def _info(prefix: str, model: str, cache: dict[str, Any], engines: Iterable[int]) -> Metric:
    texts = {name: str(value) for name, value in sorted(cache.items())}
    family = GaugeMetricFamily(f"{prefix}cache_config_info", "Settings of the KV cache.", labels=["model_name", "engine", *texts])
    for engine in engines:
        family.add_metric([model, str(engine), *texts.values()], 1)
    return family


def _sleep(prefix: str, level: int, labels: dict[int, tuple[str, str]]) -> Metric:
    family = GaugeMetricFamily(f"{prefix}engine_sleep_state", "1 for the state it is in.", labels=["model_name", "engine", "sleep_state"])
    for pair in labels.values():
        for i, state in enumerate(SLEEP_STATES):
            family.add_metric([*pair, state], float(i == level))
    return family


def _replicas(engines: dict[int, ReplicaNow], labels: dict[int, tuple[str, str]]) -> Iterator[Metric]:
    restarts = CounterMetricFamily(f"{OURS}replica_restarts", "Starts beyond the first.", labels=["model_name", "engine"])
    ready = GaugeMetricFamily(f"{OURS}replica_ready", "1: it takes requests.", labels=["model_name", "engine"])
    age = GaugeMetricFamily(f"{OURS}replica_report_age_seconds", "Since the replica last reported.", labels=["model_name", "engine"])
    for engine, one in engines.items():
        restarts.add_metric(labels[engine], one.restarts)
        ready.add_metric(labels[engine], float(one.state == "ready"))
        if one.report_age_s is not None:
            age.add_metric(labels[engine], one.report_age_s)
    yield from (restarts, ready, age)


def _ranks(engines: dict[int, ReplicaNow], model: str) -> Iterator[Metric]:
    names = ["model_name", "engine", "rank", "pp", "tp"]
    ranks = [
        ([model, str(one.replica), str(now.rank), str(now.pp), str(now.tp)], now, sums)
        for one in engines.values()
        if one.state == "ready"
        for now, sums in zip(one.ranks, one.sums, strict=True)
    ]
    for name, (text, value) in RANK_COUNTERS.items():
        counter = CounterMetricFamily(OURS + name, text, labels=names)
        for labels, _, sums in ranks:
            counter.add_metric(labels, value(sums))
        yield counter
    for name, (text, lately) in RANK_GAUGES.items():
        gauge = GaugeMetricFamily(OURS + name, text, labels=names)
        for labels, now, _ in ranks:
            if (number := lately(now)) is not None:
                gauge.add_metric(labels, number)
        yield gauge
    families = [CounterMetricFamily(OURS + name, text, labels=[*names, "collective"]) for name, text in COLLECTIVES.items()]
    for labels, _, sums in ranks:
        for collective, pair in sums.collectives.items():
            for family, number in zip(families, pair, strict=True):
                family.add_metric([*labels, collective], number)
    yield from families
