#!/usr/bin/env python3
"""Predicted against measured: TTFT, TPOT and throughput of our own engine on this machine, over models, splits, batches and lengths.

    python benchmarks/planner_vs_engine.py [--calibration FILE] [--settings 20] [--rounds 3] [--repetitions 3] [--out FILE]

Needs a calibration (`lockstep calibrate`, on the same quiet machine, minutes before; or --calibrate runs it first). Each setting is an
engine of its own, a batch of equal prompts given at once, measured `--repetitions` times or more in each of `--rounds` rounds over all
settings (neighbours slow a shared machine for tenths of a second to minutes). Among the batches, what its ranks do is looked at again and
again: the memory's bandwidth, flop/s, and steps of the small engine that the calibration measured too, for what is neither. What is
compared is the usual batch, each figure's median, and its prediction at the usual speeds, medians too: what neighbours take is in both.
Also shown: the errors as calibrated, with nothing measured again, and when scaled by the bandwidth alone, or by it and flop/s. The
prediction is the event simulation: the real scheduler, with step times of planner/cpu.py. No constant is fitted to a setting: the
calibration has models of its own, but for the small engine's, the embedded one, which is also that of four settings (two of them in
batches that the calibration runs too, with shorter answers), and it never runs two replicas or two stages. Errors of other models alone,
and of two stages or replicas, are also shown. `--measured` compares what an earlier run's --out says with another calibration. Exits 1
when the median error of a figure is above 10 % or the mean above 15 %, over all settings or over those of other models.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from statistics import mean, median
from typing import Any

import msgspec

from lockstep.cli.bench import machine
from lockstep.cli.bench.workload import fixed
from lockstep.cli.calibrate_engine import runs_of, small_engine
from lockstep.config.errors import ConfigError
from lockstep.config.model_spec import ModelSpec
from lockstep.engine.admission import Limits
from lockstep.engine.core import limits_of
from lockstep.engine.scheduler import Scheduler
from lockstep.llm import LLM
from lockstep.planner import calibration
from lockstep.planner.calibration import Calibration
from lockstep.planner.cpu import CpuModel, Scales
from lockstep.planner.layout import Layout
from lockstep.planner.model import from_spec
from lockstep.protocol import SamplingParams
from lockstep.simulation.arrivals import at_once
from lockstep.simulation.engine_cost import CalibratedCost
from lockstep.simulation.engine_steps import Run, speed
from lockstep.simulation.measure import Speeds
from lockstep.simulation.rounds import Ranks, ranks_here
from lockstep.simulation.simulate import simulate
from lockstep.testing.tiny import make_tiny

TARGETS = {"median": 0.10, "mean": 0.15}
BESIDE = ((1, 64), (4, 64))  # of the calibration's own batches: prompts, and tokens of each
BUSY_S = 1.5  # of a setting in a round
LOOK_S = 0.3  # of batches between two looks at the speeds beside: they change within a second
FIGURES = ("ttft", "tpot", "throughput")
Batch = list[list[float]]  # of each request, when its tokens came, in seconds from the start


@dataclass(frozen=True)
class Setting:
    """One engine and one batch."""

    model: str
    tp: int
    pp: int
    dp: int
    batch: int
    input_len: int
    output_len: int


# Ordered so that the first few already show every layout.
SETTINGS = [
    Setting("llama-tiny", 1, 1, 1, 8, 128, 64),
    Setting("llama-tiny", 2, 1, 1, 8, 128, 64),
    Setting("llama-tiny", 1, 2, 1, 8, 128, 64),
    Setting("llama-tiny", 1, 1, 2, 8, 128, 64),
    Setting("llama-0.5b", 1, 1, 1, 8, 128, 24),
    Setting("llama-0.5b", 2, 1, 1, 8, 128, 24),
    Setting("llama-0.5b", 1, 2, 1, 8, 128, 24),
    Setting("demo", 1, 1, 1, 32, 128, 64),
    Setting("demo", 2, 1, 1, 32, 64, 64),
    Setting("demo", 1, 2, 1, 16, 128, 64),
    Setting("demo", 1, 1, 1, 1, 512, 128),
    Setting("llama-tiny", 1, 1, 1, 32, 256, 48),
    Setting("llama-tiny", 2, 1, 1, 1, 512, 96),
    Setting("llama-tiny", 1, 1, 1, 2, 768, 96),
    Setting("llama-tiny", 1, 1, 2, 32, 64, 64),
    Setting("llama-0.5b", 1, 1, 1, 1, 64, 24),
    Setting("llama-0.5b", 2, 1, 1, 1, 256, 16),
    Setting("llama-0.5b", 1, 1, 1, 16, 32, 24),
    Setting("llama-0.5b", 2, 1, 1, 24, 32, 24),
    Setting("llama-tiny", 1, 2, 1, 16, 256, 48),
]


@dataclass
class Result:
    """One setting's figures, in seconds and tokens a second, measured and predicted."""

    setting: Setting
    measured: dict[str, float]  # each figure's median over the batches
    predicted: dict[str, float]
    as_calibrated: dict[str, float]  # nothing measured again: what `lockstep plan` says
    by_bandwidth: dict[str, float]  # predicted with the memory bandwidth measured again, nothing else
    by_memory_and_flops: dict[str, float]
    scales: Scales
    other_cores: float

    @property
    def pairs(self) -> dict[str, tuple[dict[str, float], dict[str, float]]]:
        """(predicted, measured) by how it was compared."""
        return {
            "all settings": (self.predicted, self.measured),
            "as calibrated": (self.as_calibrated, self.measured),
            "by bandwidth alone": (self.by_bandwidth, self.measured),
            "by bandwidth and flop/s": (self.by_memory_and_flops, self.measured),
        }


def folder_of(name: str, root: Path) -> str:
    """The checkpoint; "" is the embedded one. A missing one is made: a small random model in its place would be another model."""
    if name == "demo":
        return ""
    if (root / name / "config.json").exists():
        return str(root / name)
    sizes: dict[str, Any] = {
        "llama-tiny": {"hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 8, "num_attention_heads": 8},
        "llama-0.5b": {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16},
    }[name]
    made = root / f"{name}-made"
    if not (made / "config.json").exists():
        make_tiny("llama", made, dtype="bfloat16", tie_word_embeddings=False, max_position_embeddings=4096, **sizes)
    return str(made)


def once(llm: LLM, setting: Setting, seed: int) -> Batch:
    """One batch: when each request's tokens came."""
    work = fixed(llm.spec.vocab_size, setting.batch, setting.input_len, setting.output_len, seed)
    params = SamplingParams(temperature=0, max_tokens=setting.output_len, ignore_eos=True, detokenize=False)
    stamps: dict[str, list[float]] = {}
    began = time.perf_counter()
    for output in llm.stream([{"prompt_token_ids": p} for p in work.prompts], params):
        seen = stamps.setdefault(output.request_id, [])
        new = len(output.outputs[0].token_ids) - len(seen)
        seen += [time.perf_counter() - began] * new
    return list(stamps.values())


def figures(token_s: Batch) -> dict[str, float]:
    """Mean TTFT, mean TPOT, output tokens a second, as the simulation counts them."""
    return {
        "ttft": mean(t[0] for t in token_s),
        "tpot": mean((t[-1] - t[0]) / (len(t) - 1) for t in token_s),
        "throughput": sum(map(len, token_s)) / max(t[-1] for t in token_s),
    }


def busy_ranks(setting: Setting) -> int:
    """How many ranks compute at a time."""
    return min(setting.batch, setting.pp * setting.dp) * setting.tp


def predict(spec: ModelSpec, limits: Limits, setting: Setting, found: Calibration, scales: Scales) -> dict[str, float]:
    """The same batch through the event simulation."""
    layout = Layout(tp=setting.tp, pp=setting.pp, dp=setting.dp)
    shape, alone = from_spec(spec, setting.model), busy_ranks(setting) == setting.tp
    model = CpuModel(found, shape, layout, scales=scales, alone=alone)
    report = simulate(
        lambda clock: Scheduler(limits, prefix_caching=False, stages=setting.pp, clock=clock),
        CalibratedCost(model),
        at_once(setting.batch, setting.input_len, setting.output_len),
        replicas=setting.dp,
        depth=1 if setting.tp * setting.pp == 1 else max(setting.pp, 2),
    )
    return figures([r.token_s for r in report.served])


@dataclass
class Measured:
    """What one setting gave so far: its batches; the speeds of a rank beside them, look by look; other programs' use of cores, by round."""

    batches: list[Batch] = field(default_factory=list)
    speeds: list[Speeds] = field(default_factory=list)
    small: list[list[Run]] = field(default_factory=list)
    after: list[int] = field(default_factory=list)  # how many batches each look came after
    others: list[float] = field(default_factory=list)
    spec: ModelSpec | None = None
    limits: Limits | None = None


def measure(setting: Setting, root: Path, repetitions: int, ranks: Ranks, small: LLM, seen: Measured) -> None:
    """One round of one setting. ranks: as many as compute at a time, to measure the speeds that they have."""
    split = {"pipeline_parallel_size": setting.pp, "data_parallel_size": setting.dp, "data_parallel_routing": "round_robin"}
    room = {"max_model_len": 2048, "kv_cache_memory_bytes": 1 << 27, "enable_prefix_caching": False, "max_num_seqs": 32}
    noise, busy = machine.Noise(), busy_ranks(setting)

    def look() -> float:
        seen.speeds.append(ranks.speeds(busy))
        seen.small.append(runs_of(small, BESIDE, 1))
        seen.after.append(len(seen.batches))
        return time.monotonic()

    with LLM(folder_of(setting.model, root), tensor_parallel_size=setting.tp, dtype="bfloat16", **split, **room) as llm:
        once(llm, setting, 0)
        batches, spent, looked = 0, 0.0, look()
        while spent < BUSY_S or batches < repetitions:
            batches += 1
            begun = time.monotonic()
            seen.batches.append(once(llm, setting, batches))
            spent += time.monotonic() - begun
            if time.monotonic() - looked > LOOK_S:
                looked = look()
        if seen.after[-1] < len(seen.batches):
            look()
        seen.spec, seen.limits = llm.spec, limits_of(llm.config, llm.spec, llm._client.memory)
    seen.others.append(noise.other_cores())


def compared(setting: Setting, seen: Measured, found: Calibration) -> Result:
    """All rounds of one setting, and its prediction."""
    assert seen.spec is not None and seen.limits is not None
    at = partial(predict, seen.spec, seen.limits, setting, found)
    mode = found.mode(setting.tp * setting.pp * setting.dp, busy_ranks(setting))
    now, batches = Speeds(*map(median, zip(*seen.speeds, strict=True))), list(map(figures, seen.batches))
    scales = Scales(now.read / mode.bandwidth, now.multiply / mode.flops, speed(mode, seen.small))
    return Result(
        setting,
        measured={name: median(batch[name] for batch in batches) for name in FIGURES},
        predicted=at(scales),
        as_calibrated=at(Scales()),
        by_bandwidth=at(Scales(scales.bandwidth)),
        by_memory_and_flops=at(replace(scales, others=1.0)),
        scales=scales,
        other_cores=max(seen.others),
    )


def summary(results: Sequence[Result], how: str) -> dict[str, dict[str, float]]:
    """Median and mean of |predicted / measured - 1| of each figure."""
    found = {}
    for name in FIGURES:
        errors = [abs(predicted[name] / measured[name] - 1) for predicted, measured in (r.pairs[how] for r in results)]
        found[name] = {"median": median(errors), "mean": mean(errors)}
    return found


def show(result: Result) -> None:
    s = result.setting
    where = f"{s.model} TP={s.tp} PP={s.pp} DP={s.dp} batch={s.batch} {s.input_len}+{s.output_len}"
    cells = []
    for name in FIGURES:
        unit = 1.0 if name == "throughput" else 1e3
        off = result.predicted[name] / result.measured[name] - 1
        cells.append(f"{name} {result.predicted[name] * unit:9.2f} / {result.measured[name] * unit:9.2f} ({off:+.0%})")
    now = f"bandwidth x{result.scales.bandwidth:.2f}, flop/s x{result.scales.compute:.2f}, the rest x{result.scales.others:.2f}"
    print(f"{where:<48} {'  '.join(cells)}  {now}, others {result.other_cores:.1f}", flush=True)


def kept(results: Sequence[Result]) -> bool:
    """Print the errors, and whether all settings keep the bound, and those of other models than the calibration's small one do."""
    apart = {
        "other models": [r for r in results if r.setting.model != "demo"],
        "two stages or replicas": [r for r in results if r.setting.pp * r.setting.dp > 1],
    }
    lines = {how: summary(results, how) for how in results[0].pairs}
    lines |= {words: summary(some, "all settings") for words, some in apart.items() if some}
    for words, errors in lines.items():
        print(f"{words:<24}", "  ".join(f"{n}: median {e['median']:.1%}, MAPE {e['mean']:.1%}" for n, e in errors.items()))
    bound = (lines[words] for words in ("all settings", "other models") if words in lines)
    return all(e[kind] <= limit for every in bound for e in every.values() for kind, limit in TARGETS.items())


def measure_all(chosen: Mapping[Setting, Measured], rounds: int, models: Path, repetitions: int) -> None:
    """All settings in turn, so many times."""
    with (
        ranks_here(1, "bfloat16") as one,
        ranks_here(2, "bfloat16") as two,
        small_engine(1, "bfloat16") as small_one,
        small_engine(2, "bfloat16") as small_two,
    ):
        for _ in range(rounds):
            for setting, seen in chosen.items():
                split = setting.tp * setting.pp * setting.dp > 1
                beside = (two, small_two) if split else (one, small_one)
                measure(setting, models, repetitions, *beside, seen)


def saved(result: Result, seen: Measured) -> dict[str, object]:
    """A line of --out: the result, and all that it was made of."""
    return {**asdict(result), "seen": msgspec.to_builtins(seen)}


def read(path: Path) -> dict[Setting, Measured]:
    """What `saved` wrote."""
    rows = [json.loads(line) for line in path.read_text().splitlines()[1:]]
    return {Setting(**row["setting"]): msgspec.convert(row["seen"], Measured) for row in rows}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--calibration", type=Path, default=None)
    parser.add_argument("--calibrate", action="store_true", help="calibrate first")
    parser.add_argument("--models", type=Path, default=Path.home() / ".cache" / "lockstep-bench" / "models")
    parser.add_argument("--settings", type=int, default=len(SETTINGS), help="only the first so many")
    parser.add_argument("--measured", type=Path, default=None, help="an earlier run's --out: compare what it measured, measure nothing")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--out", type=Path, default=None, help="JSON lines")
    args = parser.parse_args()
    if args.calibrate:
        from lockstep.cli.calibrate import BUDGET_S, calibrate

        calibration.save(calibrate(BUDGET_S), args.calibration or calibration.path_of())
    try:
        found = calibration.load(args.calibration)
    except ConfigError as e:
        parser.error(str(e))
    if args.measured:
        chosen = read(args.measured)
    else:
        chosen = {setting: Measured() for setting in SETTINGS[: args.settings]}
        measure_all(chosen, args.rounds, args.models, args.repetitions)
    print("predicted / measured (error): milliseconds, and output tokens a second")
    results = [compared(setting, seen, found) for setting, seen in chosen.items()]
    for result in results:
        show(result)
    if args.out:
        args.out.write_text(
            "".join(json.dumps(row) + "\n" for row in [{"machine": machine.describe()}, *map(saved, results, chosen.values())])
        )
    return int(not kept(results))


if __name__ == "__main__":
    sys.exit(main())
