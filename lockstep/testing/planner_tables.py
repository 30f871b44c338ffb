"""The measured tables in tests/planner/data, as samples of the planner's families. Sources: tests/planner/data/README.md."""

from __future__ import annotations

import csv
import gzip
import io
import json
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from lockstep.planner import families
from lockstep.planner.families import Family, Sample
from lockstep.planner.fit import group_by

DATA = Path(__file__).parents[2] / "tests" / "planner" / "data"
Row = dict[str, str]
Measured = tuple[Family, list[Sample]]
COLLECTIVES = (
    ("all_reduce", "vllm_graph", "all_reduce"),
    ("all_reduce_nccl", "nccl", "all_reduce"),
    ("all_gather", "nccl", "all_gather"),
    ("reduce_scatter", "nccl", "reduce_scatter"),
    ("all_to_all", "nccl", "alltoall"),
)  # our name, whose library, its name in the table
DEEPEP_BYTES = {"dispatch": 1, "combine": 2}  # fp8 out, bf16 back


@cache
def table(name: str) -> tuple[Row, ...]:
    """The rows of tests/planner/data/NAME.csv.gz."""
    with gzip.open(DATA / f"{name}.csv.gz") as packed:
        return tuple(csv.DictReader(io.TextIOWrapper(packed, "utf-8")))


def _numbers(row: Row, *names: str) -> tuple[int, ...]:
    return tuple(int(float(row[n])) for n in names)


def gemm(system: str = "h100_sxm", dtype: str = "bf16") -> Measured:
    """Products with n, k >= 1024, by m. dtype: bf16 or fp8."""
    long = {"bf16": "bfloat16"}.get(dtype, dtype)
    rows = [r for r in table("gemm_sample") if (r["system"], r["dtype"]) == (system, long)]
    return families.gemm(long), [Sample(float(r["m"]), _numbers(r, "m", "n", "k"), float(r["us"]) * 1e-6) for r in rows]


def attention(phase: str) -> Measured:
    """FlashAttention 3 on H100, by context. phase: prefill or decode."""
    columns = ("batch_size", "ctx", "num_heads", "num_key_value_heads", "head_dim")
    rows = [r for r in table("attention_h100_fa3_sample") if r["phase"] == phase]
    samples = [Sample(float(r["ctx"]), _numbers(r, *columns), float(r["us"]) * 1e-6) for r in rows]
    return (families.prefill() if phase == "prefill" else families.decode()), samples


def moe(routing: str) -> dict[str, Measured]:
    """Fused MoE of vLLM on H100 for each model shape, by tokens. routing: balanced or skewed (power law 1.2)."""
    columns = ("num_tokens", "hidden_size", "inter_size", "num_experts", "topk", "moe_tp_size", "moe_ep_size")
    rows = [r for r in table("moe_h100_bf16_sample") if r["distribution"].startswith("balanced") == (routing == "balanced")]
    shapes = group_by(rows, lambda r: f"{r['num_experts']} experts of {r['hidden_size']}x{r['inter_size']}")
    family = families.moe(routing)
    return {
        str(shape): (family, [Sample(float(r["num_tokens"]), _numbers(r, *columns), float(r["us"]) * 1e-6) for r in found])
        for shape, found in shapes.items()
    }


def collectives(system: str = "h100_sxm") -> Iterator[tuple[str, int, Measured]]:
    """(operation, ranks, what was measured) within a node, by bytes."""
    for name, library, op in COLLECTIVES:
        rows = [r for r in table("collectives_intra_node") if (r["system"], r["library"], r["op"]) == (system, library, op)]
        for ranks, found in group_by(rows, lambda r: int(r["num_gpus"])).items():
            yield name, ranks, (families.collective(name, ranks), _by_bytes(found, "us"))


def _by_bytes(rows: list[Row], column: str) -> list[Sample]:
    return [Sample(float(r["bytes"]), (float(r["bytes"]),), float(r[column]) * 1e-6) for r in rows]


def messages(platform: str = "h100_dgx", between: bool = False) -> Measured:
    """Send and receive of one message, by bytes, inside a node or between two."""
    rows = table("vidur_network_intra_inter_node")
    found = [r for r in rows if (r["platform"], r["op"], r["num_nodes"]) == (platform, "send_recv", "2" if between else "1")]
    return (families.between() if between else families.collective("p2p", 2)), _by_bytes(found, "us_median")


def deepep(op: str, mode: str = "low_latency") -> dict[int, Measured]:
    """DeepEP on H100 for each number of nodes, by tokens of a rank. op: dispatch or combine; mode: low_latency or normal."""
    name = f"deepep_{op}" if mode == "low_latency" else f"deepep_{mode}_{op}"
    column = f"{op}_avg_t_us" if mode == "low_latency" else f"{op}_transmit_us"
    rows = [r for r in table(f"deepep_{mode}_h100_1_2_4_8_nodes") if r.get("dispatch_sms", "20") == "20"]
    found: dict[int, Measured] = {}
    for nodes, group in group_by(rows, lambda r: int(r["node_num"])).items():
        samples = []
        for r in group:
            tokens, hidden, topk = _numbers(r, "num_token", "hidden_size", "num_topk")
            sent = float(tokens * hidden * topk * DEEPEP_BYTES[op])
            samples.append(Sample(tokens, (sent,), float(r[column]) * 1e-6))
        found[nodes] = families.collective(name, nodes, 2e-5), samples
    return found


def cpu() -> Iterator[Measured]:
    """Products and gloo on one core of a 2-core machine."""
    raw = json.loads((DATA / "cpu_calibration_2core.json").read_text(encoding="utf-8"))
    gemms = [Sample(r["m"], (r["m"], r["n"], r["k"]), r["us"] * 1e-6) for r in raw["gemm_bf16_us"]]
    yield families.gemm("bfloat16"), gemms
    for ranks in (2, 4):
        found = [Sample(r["bytes"], (r["bytes"],), r["us"] * 1e-6) for r in raw["gloo_allreduce_us"] if r["n"] == ranks]
        yield families.collective("all_reduce", ranks, 2e-4, 2e9), found
    messages = [Sample(r["bytes"], (r["bytes"],), r["us"] * 1e-6) for r in raw["gloo_sendrecv_us"]]
    yield families.collective("p2p", 2, 7e-5, 4e9), messages
