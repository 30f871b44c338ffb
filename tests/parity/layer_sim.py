"""All ranks of a tensor-parallel group in one process: each rank is a thread, collectives meet at a barrier."""

import threading
from collections import Counter

import torch

from lockstep.distributed.communicators.base import Communicator


class SimRank:
    """What layers use of a group coordinator, plus a count of the collectives made. Sums run in rank order."""

    def __init__(self, world: "SimWorld", rank: int):
        self.world, self.rank_in_group, self.world_size = world, rank, world.size
        self.calls = Counter()

    def _exchange(self, op, x):
        self.calls[op] += 1
        self.world.box[self.rank_in_group] = (op, x.clone())
        self.world.barrier.wait()
        parts = list(self.world.box)
        assert {name for name, _ in parts} == {op}, f"ranks disagree: {[name for name, _ in parts]}"
        assert len({tuple(part.shape) for _, part in parts}) == 1, f"shapes differ: {[tuple(p.shape) for _, p in parts]}"
        self.world.barrier.wait()
        return [part for _, part in parts]

    def all_reduce_(self, x):
        x.copy_(torch.stack(self._exchange("all_reduce", x)).sum(0))

    def all_gather(self, x, dim=-1):
        return torch.cat(self._exchange("all_gather", x), dim=dim)

    def largest(self, values, ids):
        return Communicator.largest(self, values, ids)

    def gather(self, x, dst=0, dim=-1):
        parts = self._exchange("gather", x)
        return torch.cat(parts, dim=dim) if self.rank_in_group == dst else None


class SimWorld:
    def __init__(self, size: int):
        self.size = size
        self.barrier = threading.Barrier(size, timeout=60)
        self.box = [None] * size


def simulate(size, rank_main):
    """`rank_main(group)` on every rank at once; the results by rank. The first exception of any rank is raised."""
    world = SimWorld(size)
    results, errors = [None] * size, []

    def main(rank):
        try:
            with torch.no_grad():
                results[rank] = rank_main(SimRank(world, rank))
        except threading.BrokenBarrierError:
            pass
        except BaseException as e:
            errors.append(e)
            world.barrier.abort()

    threads = [threading.Thread(target=main, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    return results


def fill(layer, param, full):
    """Fill a parameter from full tensors through the layer's own pieces, with NaN wherever the pieces leave a hole.

    `full` is one tensor, or a dict of shard id -> tensor. Vocabulary padding stays as the layer made it.
    """
    target = getattr(layer, param).data
    padding = target.shape[0] - layer.shard.filled.size if hasattr(layer, "vocab_shards") else 0
    target[: target.shape[0] - padding] = float("nan")
    parts = full if isinstance(full, dict) else {None: full}
    assert set(parts) == set(layer.shard_ids(param))
    for shard_id, tensor in parts.items():
        piece = layer.pieces(param, shard_id)
        assert tuple(tensor.shape) == piece.full_shape
        target.narrow(piece.dim, piece.dest_start, piece.size).copy_(tensor.narrow(piece.dim, piece.src_start, piece.size))
    assert not target.isnan().any(), f"{param} has parts that no piece fills"
