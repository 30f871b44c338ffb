"""What pipeline stages hand each other: the residual stream of a step's tokens, forward only.

    stage            0                1                last
    activations      forward -send->  recv, forward -> recv, forward, sample

Sampled tokens go back to the first stage by themselves (`returns`). With one stage nothing is sent.
"""

from __future__ import annotations

from lockstep.distributed.groups import ParallelGroups
from lockstep.distributed.handles import Handle
from lockstep.models.decoder import Intermediate


def receive(groups: ParallelGroups) -> Intermediate | None:
    """What the stage before computed for this step; None on the first stage."""
    if groups.pp.is_first_rank:
        return None
    received = groups.pp.recv_tensor_dict(all_gather_group=groups.tp)
    assert received is not None
    return received


def send(groups: ParallelGroups, result: Intermediate) -> list[Handle]:
    """Start handing this stage's result on; wait for the handles before sending again.

    Every TP rank holds the same; each sends a part, and the next stage's ranks join them.
    """
    return groups.pp.isend_tensor_dict(dict(result), all_gather_group=groups.tp)
