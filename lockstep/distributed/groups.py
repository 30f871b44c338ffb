"""The groups that layers, models and workers are handed."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from lockstep.distributed.group import GroupCoordinator, solo_group


@dataclass(frozen=True)
class ParallelGroups:
    """This rank's group on every axis. `ep` and `eplb` are None where they were not made."""

    tp: GroupCoordinator
    pp: GroupCoordinator
    dp: GroupCoordinator
    world: GroupCoordinator
    pcp: GroupCoordinator
    dcp: GroupCoordinator
    replica: GroupCoordinator
    ep: GroupCoordinator | None = None
    eplb: GroupCoordinator | None = None

    @classmethod
    def solo(cls, device: torch.device | str | None = None) -> ParallelGroups:
        """One rank, no torch.distributed: every collective is free. Each call makes its own groups."""

        def one(name: str) -> GroupCoordinator:
            return solo_group(name, device)

        return cls(
            tp=one("tp"), pp=one("pp"), dp=one("dp"), world=one("world"), pcp=one("pcp"), dcp=one("dcp"),
            replica=one("inner_dp_world"), ep=one("ep"), eplb=one("eplb"),
        )  # fmt: skip

    @classmethod
    def current(cls) -> ParallelGroups:
        """The process-wide groups of `parallel_state`, after `initialize_model_parallel`."""
        from lockstep.distributed import parallel_state as state

        return cls(
            tp=state.get_tp_group(),
            pp=state.get_pp_group(),
            dp=state.get_dp_group(),
            world=state.get_world_group(),
            pcp=state.get_pcp_group(),
            dcp=state.get_dcp_group(),
            replica=state.get_inner_dp_world_group(),
            ep=state.find_group("ep"),
            eplb=state.find_group("eplb"),
        )

    def destroy(self) -> None:
        """Release groups that `solo` made; the process-wide ones are `destroy_model_parallel`'s."""
        for group in (self.tp, self.pp, self.dp, self.world, self.pcp, self.dcp, self.replica, self.ep, self.eplb):
            if group is not None:
                group.destroy()
