"""How much of the time pipeline stages idle, beside what theory allows with the stage times of the same run: each step's own time
(`predicted`), the stages' mean times (`by_means`), and equal ones (`formula`).

    python benchmarks/pipeline.py MODEL -pp 2

Bounded prefill: some prompts, each one micro-batch, fill and drain the pipeline. Steady decode: as many micro-batches in flight
as stages; the middle half of the steps counts. Each is recorded several times; a JSON line gives every repetition and the median.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from statistics import median
from typing import Any

from lockstep.cli.bench import machine
from lockstep.cli.bench.workload import fixed
from lockstep.llm import LLM
from lockstep.observability.pipeline_chart import Schedule, bounded_idle, steady_idle
from lockstep.protocol import SamplingParams

PROMPTS, PROMPT_LEN = 8, 512


def run(llm: LLM, count: int, prompt_len: int, output_len: int, seed: int) -> Schedule:
    """The stages' schedule of one recorded workload."""
    work = fixed(llm.spec.vocab_size, count, prompt_len, output_len).shifted(seed, llm.spec.vocab_size)
    params = SamplingParams(temperature=0, max_tokens=output_len, ignore_eos=True, detokenize=False)
    llm.start_profile()
    llm.generate([{"prompt_token_ids": p} for p in work.prompts], params, use_tqdm=False)
    parallel = llm.config.parallel
    return Schedule.of(llm.stop_profile(), parallel.pipeline_parallel_size, parallel.stage_size)


def line(name: str, measured: list[float], predicted: list[float], by_means: list[float], **more: Any) -> dict[str, Any]:
    """A result: medians, their ratio, and every repetition."""
    ratio = median(m / p for m, p in zip(measured, predicted, strict=True)) if min(predicted) > 1e-3 else None
    return {
        "metric": name,
        "value": round(median(measured), 4),
        "unit": "share",
        "predicted": round(median(predicted), 4),
        "measured_over_predicted": None if ratio is None else round(ratio, 3),
        "all": [round(m, 4) for m in measured],
        "all_predicted": [round(p, 4) for p in predicted],
        "by_means": round(median(by_means), 4),
        **more,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--pipeline-parallel-size", "-pp", type=int, default=2)
    parser.add_argument("--pipeline-layer-partition", default=None)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--prompts", type=int, default=PROMPTS, help="of the bounded prefill, a micro-batch each")
    parser.add_argument("--repetitions", type=int, default=5)
    args = parser.parse_args()
    about: dict[str, Any] = {"engine": "lockstep", "model": os.path.basename(args.model.rstrip("/")), "pp": args.pipeline_parallel_size}
    about["machine"] = machine.describe()
    about |= {"partition": args.pipeline_layer_partition or "balanced", "command": "python " + " ".join([sys.argv[0], *sys.argv[2:]])}
    room = {"max_model_len": 1024, "kv_cache_memory_bytes": 1 << 28, "enable_prefix_caching": False}
    split = {"pipeline_parallel_size": args.pipeline_parallel_size, "pipeline_layer_partition": args.pipeline_layer_partition}
    found: dict[str, list[list[float]]] = {"prefill": [[], [], []], "decode": [[], [], []]}
    p, m = args.pipeline_parallel_size, min(args.batch, args.pipeline_parallel_size)
    formulas = {"prefill": (p - 1) / (p + args.prompts - 1), "decode": 1 - m / p}
    with LLM(args.model, max_num_batched_tokens=PROMPT_LEN, max_num_seqs=args.batch, threads_per_rank=1, **split, **room) as llm:
        run(llm, args.batch, 16, 8, 0)
        for number in range(1, args.repetitions + 1):
            watch = machine.Noise()
            prefill = run(llm, args.prompts, PROMPT_LEN, 1, number)
            whole = run(llm, args.batch, 16, 64, number)
            decode = whole.middle()
            for name, schedule, played, means in (
                ("prefill", prefill, prefill.played(), bounded_idle(prefill.mean_s(), prefill.micro_batches)),
                ("decode", decode, whole.played(m).middle(), steady_idle(decode.mean_s(), m)),
            ):
                for values, value in zip(found[name], (schedule.idle_share(), played.idle_share(), means), strict=True):
                    values.append(value)
                times = ", ".join(f"{mean * 1e3:.1f}" for mean in schedule.mean_s())
                said = f"idle {schedule.idle_share():.3f}, predicted {played.idle_share():.3f}, by means {means:.3f}"
                print(f"{name}: {said}; ms a stage {times}", file=sys.stderr)
            print(f"other cores busy: {watch.other_cores():.2f}", file=sys.stderr)
        print(f"{decode.picture()}", file=sys.stderr)
    for name, what in (("prefill", "idle_share_bounded_prefill"), ("decode", "idle_share_steady_decode")):
        batch = args.prompts if name == "prefill" else args.batch
        print(json.dumps(line(what, *found[name], formula=round(formulas[name], 4), batch=batch, **about)))


if __name__ == "__main__":
    main()
