"""What each rank does in test_layers_ranks: the parallel layers over a real process group."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from lockstep.distributed import parallel_state as ps
from lockstep.layers.embedding import ParallelLMHead, VocabParallelEmbedding
from lockstep.layers.linear import ColumnParallelLinear, MergedColumnParallelLinear, RowParallelLinear
from lockstep.layers.logits import LogitsProcessor
from lockstep.layers.qkv import QKVParallelLinear
from lockstep.weights.loader import load_weights
from lockstep.weights.plan import plan_tasks

HIDDEN, DIM, HEADS, KV_HEADS, INNER, VOCAB = 24, 6, 14, 2, 44, 130


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def weights(bias: bool) -> dict[str, Any]:
    """The whole layers' parameters, the same in every process."""
    sizes = {"q": HEADS * DIM, "k": KV_HEADS * DIM, "v": KV_HEADS * DIM, "gate": INNER, "up": INNER}
    full: dict[str, Any] = {name: (normal(n, HIDDEN, seed=i) / 5, normal(n, seed=i)) for i, (name, n) in enumerate(sizes.items())}
    full["o"] = (normal(HIDDEN, HEADS * DIM, seed=9) / 9, normal(HIDDEN, seed=9))
    full["down"] = (normal(HIDDEN, INNER, seed=10) / 7, normal(HIDDEN, seed=10))
    full["embed"] = (normal(VOCAB, HIDDEN, seed=11), None)
    return {name: (w, b if bias else None) for name, (w, b) in full.items()}


def attention(q: Tensor, k: Tensor, v: Tensor, kv_of_q: Any) -> Tensor:
    index = torch.tensor(list(kv_of_q))
    q, k, v = q.transpose(0, 1), k[:, index].transpose(0, 1), v[:, index].transpose(0, 1)
    return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(0, 1).flatten(1)


def whole(ids: Tensor, bias: bool) -> dict[str, Tensor]:
    """One decoder layer without norms, unsharded, in plain torch."""
    w = weights(bias)
    hidden = w["embed"][0][ids]
    q, k, v = (F.linear(hidden, *w[name]).unflatten(-1, (-1, DIM)) for name in "qkv")
    mixed = hidden + F.linear(attention(q, k, v, [h // (HEADS // KV_HEADS) for h in range(HEADS)]), *w["o"])
    gate, up = F.linear(mixed, *w["gate"]), F.linear(mixed, *w["up"])
    out = mixed + F.linear(F.silu(gate) * up, *w["down"])
    return {"hidden": out, "logits": F.linear(out, w["embed"][0]), "gate": gate}


def _put(layer: Any, param: str, shard_id: Any, full: Tensor | None) -> None:
    if full is not None:
        piece = layer.pieces(param, shard_id)
        dest = getattr(layer, param).data.narrow(piece.dim, piece.dest_start, piece.size)
        dest.copy_(full.narrow(piece.dim, piece.src_start, piece.size))


def _fill(layer: Any, parts: dict[Any, tuple[Tensor, Tensor | None]]) -> Any:
    for shard_id, (w, b) in parts.items():
        _put(layer, "weight", shard_id, w)
        _put(layer, "bias", shard_id, b)
    return layer


def _counted(op: str, real: Callable[..., Any], calls: dict[str, int]) -> Callable[..., Any]:
    def call(*args: Any, **kw: Any) -> Any:
        calls[op] = calls.get(op, 0) + 1
        return real(*args, **kw)

    return call


@torch.inference_mode()
def decoder(rank: int, world_size: int, ids: Tensor, bias: bool) -> dict[str, Any]:
    """The same decoder layer over `world_size` ranks, and how many collectives of each kind the rank made."""
    torch.set_num_threads(1)
    ps.initialize_model_parallel(tensor_model_parallel_size=world_size)
    tp, w = ps.get_tp_group(), weights(bias)
    calls: dict[str, int] = {}
    for op in ("all_reduce_", "all_reduce", "all_gather", "gather", "broadcast", "reduce_scatter"):
        setattr(tp, op, _counted(op, getattr(tp, op), calls))
    place: Any = {"tp": tp, "dtype": torch.float32, "device": "cpu"}
    embed = _fill(VocabParallelEmbedding(VOCAB, HIDDEN, **place), {None: w["embed"]})
    qkv = _fill(QKVParallelLinear(HIDDEN, DIM, HEADS, KV_HEADS, bias=bias, return_bias=False, **place), {x: w[x] for x in "qkv"})
    o = _fill(RowParallelLinear(HEADS * DIM, HIDDEN, bias, units=HEADS, return_bias=False, **place), {None: w["o"]})
    gate_up = _fill(MergedColumnParallelLinear(HIDDEN, (INNER, INNER), bias, return_bias=False, **place), {0: w["gate"], 1: w["up"]})
    down = _fill(RowParallelLinear(INNER, HIDDEN, bias, return_bias=False, **place), {None: w["down"]})
    gathered = _fill(ColumnParallelLinear(HIDDEN, INNER, bias, gather_output=True, return_bias=False, **place), {None: w["gate"]})
    head = ParallelLMHead(VOCAB, HIDDEN, **place).tie_weights(embed)

    hidden = embed(ids)
    after_embedding = dict(calls)
    q, k, v = (part.unflatten(-1, (-1, DIM)) for part in qkv.split(qkv(hidden)))
    hidden = hidden + o(attention(q, k, v, qkv.kv_of_q))
    mixed = hidden
    gate, up = gate_up(hidden).chunk(2, dim=-1)
    hidden = hidden + down(F.silu(gate) * up)
    in_layer = {op: n - after_embedding.get(op, 0) for op, n in calls.items()}
    logits = LogitsProcessor(VOCAB, tp=tp)
    return {
        "in_layer": {op: n for op, n in in_layer.items() if n},
        "hidden": hidden,
        "logits": logits(head, hidden),
        "top": logits.top_tokens(head, hidden),
        "gate": gathered(mixed),
    }


def load(rank: int, world_size: int, folder: str) -> dict[str, Any]:
    """Load this rank's part of the small checkpoint; what it read, and whether every slice is right."""
    from safetensors.torch import load_file

    from tests.unit.weights_model import Model

    ps.initialize_model_parallel(tensor_model_parallel_size=world_size)
    tp = ps.get_tp_group()
    model = Model(tp.world_size, tp.rank_in_group)
    report = load_weights(model, folder)
    full = load_file(Path(folder) / "model.safetensors")
    wrong = [
        task.name
        for task in plan_tasks(model)
        if not torch.equal(full[task.name].narrow(task.piece.dim, task.piece.src_start, task.piece.size), task.dest)
    ]
    return {"wrong": wrong, "bytes_read": report.bytes_read, "owned": sum(t.dest.nbytes for t in plan_tasks(model))}
