"""Whole steps against the peer's grid, and whole servers against measured runs: what the planner says beside each row."""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

from lockstep.planner.find import find_model
from lockstep.planner.fit import group_by
from lockstep.planner.hardware import Cluster
from lockstep.planner.layer import Setting, Work
from lockstep.planner.layout import Layout
from lockstep.planner.load import Replica, Serving, Workload
from lockstep.planner.serving import Run
from lockstep.planner.step import Pricer
from lockstep.testing.planner_tables import table

CHUNK = 8192  # tokens of a step in the measured servers
VLLM_GROUPS = (("meta-llama/Llama-3.1-70B", "fp8"), ("Qwen/Qwen3-32B", "bfloat16"))  # (model, weights)


class GridRow(NamedTuple):
    """A row of the static grid, seconds; the peer's tables (`ttft_s`, `tpot_s`) and ours."""

    name: str
    ttft_s: float
    tpot_s: float
    our_ttft_s: float
    our_tpot_s: float


def static_grid(cluster: Cluster) -> list[GridRow]:
    """One batch prefilled at once, then decoded: aiconfigurator's predictions from its full op tables, and ours."""
    pricers = {name: _pricer(name, cluster) for name in {r["model"] for r in table(GRID)}}
    found = []
    for row in table(GRID):
        tp, batch, isl, osl = (int(row[key]) for key in ("tp", "batch", "isl", "osl"))
        pricer, layout = pricers[row["model"]], Layout(tp=tp)
        prefill = pricer.step(layout, together(batch, isl)).sum_s
        decode = pricer.step(layout, Work(True, batch, isl + osl / 2)).sum_s
        name = f"{row['model']} TP={tp} {batch} x {isl}"
        found.append(GridRow(name, float(row["ttft_silicon_ms"]) / 1e3, float(row["tpot_silicon_ms"]) / 1e3, prefill, decode))
    return found


GRID = "aiconfigurator_static_grid_h100_vllm024"


def together(batch: int, tokens: int) -> Work:
    """`batch` prompts in one step."""
    return Work(False, batch * tokens, 0.0, batch)


def _pricer(model: str, cluster: Cluster, weights: str = "") -> Pricer:
    return Pricer(Setting(find_model(model)[0], cluster, weights))


@cache
def runs(model: str, weights: str, cluster: Cluster, backend: str = "vllm") -> tuple[Run, ...]:
    """The measured runs of a deployment on H100. weights: fp8 or bfloat16."""
    pricer = _pricer(model.replace("meta-llama/Llama", "meta-llama/Meta-Llama"), cluster, weights if weights == "fp8" else "")
    found = []
    for row in table("e2e_measured_h100_h200_agg"):
        if (row["model_path"], row["gemm_quant_mode"], row["backend"]) == (model, weights, backend):
            isl, osl, concurrency, tp = (int(float(row[key])) for key in ("isl", "osl", "concurrency", "tp_size"))
            replica = Replica(pricer, Layout(tp=tp), Workload(isl, osl), CHUNK, Serving())
            found.append(Run(replica, concurrency, float(row["ttft_ms"]) / 1e3, float(row["tpot_ms"]) / 1e3))
    return tuple(found)


def deployments() -> list[tuple[str, str, str]]:
    """(model, weights, engine) of every measured deployment with a dense model that the catalogue knows, and at least 10 runs."""
    rows = group_by(table("e2e_measured_h100_h200_agg"), lambda r: (r["model_path"], r["gemm_quant_mode"], r["backend"]))
    dense = ("meta-llama/Llama-3.1-70B", "Qwen/Qwen3-32B", "meta-llama/Llama-3.1-8B-Instruct")
    return sorted((m, w, b) for (m, w, b), found in rows.items() if m in dense and len(found) >= 10)
