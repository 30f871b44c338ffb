"""From a model's rules to the list of slices that this rank holds, checked for completeness."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor, nn

from lockstep.layers.base import Piece, whole
from lockstep.weights.name_map import ShardId, WeightRule


class LoadableModel(Protocol):
    """What the loader asks of a model: a torch module that declares its weights."""

    def weight_map(self) -> list[WeightRule]: ...
    def get_submodule(self, target: str) -> nn.Module: ...
    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]: ...


@dataclass(frozen=True)
class Task:
    """Fill `piece.dest` of `param` (part of the model's parameter `target`) from checkpoint tensor `name`."""

    name: str
    target: str
    param: Tensor
    piece: Piece

    @property
    def module(self) -> str:
        """The name of the module whose parameter it is."""
        return self.target.rpartition(".")[0]

    @property
    def dest(self) -> Tensor:
        """The part of the parameter that the slice fills, a view."""
        return self.param.data.narrow(self.piece.dim, self.piece.dest_start, self.piece.size)


def plan_tasks(model: LoadableModel) -> list[Task]:
    """Every slice this rank holds, in rule order.

    Asserts that the rules fill each parameter of the model exactly once: a hole is the model's bug, not the user's.
    """
    tasks: list[Task] = []
    filled: dict[int, set[ShardId]] = {}
    wanted: dict[int, tuple[str, set[ShardId]]] = {id(param): (name, {None}) for name, param in model.named_parameters()}
    for rule in model.weight_map():
        if rule.module is None or not rule.here:
            continue
        module = model.get_submodule(rule.module)
        target = f"{rule.module}.{rule.param}"
        param = getattr(module, rule.param, None)
        assert isinstance(param, Tensor), f"the rule for {rule.name} fills {target}, which does not exist"
        pieces, shard_ids = getattr(module, "pieces", None), getattr(module, "shard_ids", None)
        piece = whole(param) if pieces is None else pieces(rule.param, rule.shard_id)
        if shard_ids is not None:
            wanted[id(param)] = (target, set(shard_ids(rule.param)))
        seen = filled.setdefault(id(param), set())
        assert rule.shard_id not in seen, f"two rules fill {target} {rule.shard_id!r}; the second is {rule.name}"
        seen.add(rule.shard_id)
        tasks.append(Task(rule.name, target, param, piece))
    for key, (name, shard_ids) in wanted.items():
        assert filled.get(key, set()) == shard_ids, f"no rule fills {name}: {sorted(map(str, shard_ids - filled.get(key, set())))}"
    return tasks
