"""How long the planner's search of the whole space takes, on one core: python benchmarks/planner_search.py

Every TP (also across nodes), PP, DP, EP and CP, every batch limit and chunk; process CPU seconds beside wall seconds, since other
work on the machine adds to the latter. Each row is the best of three runs in a fresh process with cold caches.
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


def once(model: str, cluster: str) -> dict[str, float]:
    """One search in this process: layouts looked at, those with a fitting memory, seconds."""
    from lockstep.planner.catalogue import cluster as find_cluster
    from lockstep.planner.find import find_model
    from lockstep.planner.layer import Setting
    from lockstep.planner.load import Serving, Workload
    from lockstep.planner.search import Search
    from lockstep.planner.step import Pricer

    wall, cpu = time.perf_counter(), time.process_time()
    search = Search(Pricer(Setting(find_model(model)[0], find_cluster(cluster))), Workload(2000, 300, None, 2.0, 0.05), Serving())
    found = search.all()
    best = search.order(found)[0]
    seconds = {"cpu_s": time.process_time() - cpu, "wall_s": time.perf_counter() - wall}
    return {**seconds, "layouts": len(found), "fit": sum(c.fits > 0 for c in found), "devices": best.layout.devices * best.at_most}


def fresh(case: tuple[str, str, float]) -> dict[str, float]:
    """`once` in a new interpreter."""
    done = subprocess.run([sys.executable, __file__, *case[:2]], capture_output=True, text=True, check=True, timeout=300)
    result: dict[str, float] = json.loads(done.stdout)
    return result


def main() -> int:
    if len(sys.argv) == 3:
        print(json.dumps(once(sys.argv[1], sys.argv[2])))
        return 0
    print(f"{'model':<16}{'cluster':<14}{'layouts':>9}{'that fit':>10}{'CPU s':>9}{'wall s':>9}{'limit s':>9}")
    for case in CASES:
        runs = [fresh(case) for _ in range(3)]
        best, wall = min(runs, key=lambda r: r["cpu_s"]), min(r["wall_s"] for r in runs)
        print(f"{case[0]:<16}{case[1]:<14}{best['layouts']:>9}{best['fit']:>10}{best['cpu_s']:>9.3f}{wall:>9.3f}{case[2]:>9.1f}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
