"""How long the planner takes, on one core: python benchmarks/planner_search.py

Every TP (also across nodes), PP, DP, EP and CP, every batch limit and chunk. `search` is the choice alone: all layouts and the best of
them. `plan` is the whole answer, with reasons, memory, trade-off and commands. `in all` is the CPU time of the process, the
interpreter's start and imports with it. Process CPU seconds, beside wall seconds of the plan, since other work on the machine adds
to the latter. Each figure is the best of three fresh processes with cold caches.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time

CASES = (
    ("llama-3.1-70b", "2x8xH100", 0.1),
    ("deepseek-v3", "8x8xH100", 1.0),
    ("llama-3.1-405b", "1250x8xH100", 10.0),
    ("deepseek-v3", "1250x8xH100", 10.0),
)


ASK = (2000, 300, None, 2.0, 0.05)  # tokens in and out, no rate, TTFT and TPOT in seconds


def search(model: str, cluster: str) -> dict[str, float]:
    """One search in this process: layouts looked at, those with a fitting memory, seconds."""
    from lockstep.planner.catalogue import cluster as find_cluster
    from lockstep.planner.find import find_model
    from lockstep.planner.layer import Setting
    from lockstep.planner.load import Serving, Workload
    from lockstep.planner.search import Search
    from lockstep.planner.step import Pricer

    cpu = time.process_time()
    search = Search(Pricer(Setting(find_model(model)[0], find_cluster(cluster))), Workload(*ASK), Serving())
    found = search.all()
    search.order(found)
    return {"search_s": time.process_time() - cpu, "layouts": len(found), "fit": sum(c.fits > 0 for c in found)}


def whole(model: str, cluster: str) -> dict[str, float]:
    """One plan in this process: seconds of it, and of all that this process did."""
    from lockstep.planner import plan

    input_len, output_len, rate, ttft, tpot = ASK
    wall, cpu = time.perf_counter(), time.process_time()
    plan(model, cluster, input_len=input_len, output_len=output_len, rate=rate, ttft=ttft, tpot=tpot)
    done = time.process_time()
    return {"plan_s": done - cpu, "wall_s": time.perf_counter() - wall, "all_s": done}


MEASURES = {"search": search, "plan": whole}


def fresh(what: str, model: str, cluster: str) -> dict[str, float]:
    """One measure in a new interpreter."""
    done = subprocess.run([sys.executable, __file__, what, model, cluster], capture_output=True, text=True, check=True, timeout=300)
    result: dict[str, float] = json.loads(done.stdout)
    return result


def main() -> int:
    if len(sys.argv) == 4:
        print(json.dumps(MEASURES[sys.argv[1]](*sys.argv[2:])))
        return 0
    heads = ("layouts", "that fit", "search s", "plan s", "in all s", "wall s", "limit s")
    print(f"{'model':<16}{'cluster':<14}{''.join(f'{head:>10}' for head in heads)}")
    for model, cluster, limit in CASES:
        runs = [fresh(what, model, cluster) for what in MEASURES for _ in range(3)]
        best = {key: min(run[key] for run in runs if key in run) for key in {key for run in runs for key in run}}
        times = "".join(f"{best[key]:>10.3f}" for key in ("search_s", "plan_s", "all_s", "wall_s"))
        print(f"{model:<16}{cluster:<14}{best['layouts']:>10}{best['fit']:>10}{times}{limit:>10.1f}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
