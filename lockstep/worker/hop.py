"""What pipeline stages hand each other: activations forward within a step, sampled tokens back at its end.

    stage            0                1                last
    activations      forward -send->  recv, forward -> recv, forward, sample
    tokens           recv  <--------- recv  <--------- broadcast

With one stage nothing is sent.
"""

from __future__ import annotations

from torch import Tensor

from lockstep.distributed.groups import ParallelGroups
from lockstep.models.decoder import Intermediate


def receive(groups: ParallelGroups) -> Intermediate | None:
    """What the stage before computed for this step; None on the first stage."""
    if groups.pp.is_first_rank:
        return None
    received = groups.pp.recv_tensor_dict(all_gather_group=groups.tp)
    assert received is not None
    return received


def send(groups: ParallelGroups, result: Intermediate) -> None:
    """Hand this stage's result on. Every TP rank holds the same; each sends a part, and the next stage's ranks join them."""
    groups.pp.send_tensor_dict(dict(result), all_gather_group=groups.tp)


def share_tokens(groups: ParallelGroups, tokens: Tensor) -> Tensor:
    """The sampled tokens `[rows]` of the last stage's first TP rank, on every rank. `tokens` of the others is only its shape."""
    if groups.pp.is_last_rank:
        tokens = groups.tp.broadcast(tokens, src=0)
    return groups.pp.broadcast(tokens, src=groups.pp.world_size - 1)
