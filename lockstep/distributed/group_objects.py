"""The part of GroupCoordinator that moves objects."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lockstep.distributed import objects

if TYPE_CHECKING:
    from lockstep.distributed.communicators.base import Communicator
    from lockstep.distributed.handles import Handle


class ObjectTransfer:
    """Objects are msgpack data (see `codec`): what cannot be encoded is a TypeError before anything is sent."""

    world_size: int
    rank_in_group: int
    cpu_communicator: Communicator
    mq_broadcaster: Any

    if TYPE_CHECKING:

        def _enter(self, op: str, *tensors: Any, detail: str = "") -> None: ...
        def _note(self, op: str, *tensors: Any, detail: str = "") -> None: ...
        def _peer(self, rank_in_group: int, word: str) -> int: ...

    def broadcast_object(self, obj: Any = None, src: int = 0) -> Any:
        """Group rank `src`'s object, on every rank."""
        self._peer(src, "src")
        if self.world_size == 1:
            return obj
        self._enter("broadcast_object", detail=f"src={src}")
        if self.mq_broadcaster is not None and src == self.mq_broadcaster.writer_rank:
            return self.mq_broadcaster.broadcast_object(obj)
        return objects.broadcast(self.cpu_communicator, obj, src)

    def broadcast_object_list(self, obj_list: list[Any], src: int = 0, group: Any = None) -> list[Any]:
        """Replace the entries of `obj_list`, in place, by rank `src`'s.

        group: another group to use (a GroupCoordinator, or a torch ProcessGroup with gloo); `src` counts in it then.
        """
        comm = self.cpu_communicator if group is None else objects.communicator_of(group)
        assert 0 <= src < comm.world_size, f"Invalid src rank ({src}): the group has {comm.world_size}"
        if comm.world_size == 1:
            return obj_list
        if group is None:
            self._enter("broadcast_object_list", detail=f"src={src}")
        received = objects.broadcast(comm, obj_list, src)
        if len(received) != len(obj_list):
            raise ValueError(f"broadcast_object_list: rank {src} sent {len(received)} objects, this list has {len(obj_list)}.")
        obj_list[:] = received
        return obj_list

    def all_gather_objects(self, obj: Any) -> list[Any]:
        """Every rank's object, in group order, on every rank."""
        if self.world_size > 1:
            self._enter("all_gather_objects")
        return objects.all_gather(self.cpu_communicator, obj)

    def _other(self, rank: int, word: str) -> int:
        self._peer(rank, word)
        assert rank != self.rank_in_group, f"Invalid {word} rank ({rank}): it is this rank itself"
        return rank

    def send_object(self, obj: Any, dst: int) -> None:
        """Send to group rank `dst`; returns when the object is on its way and may be changed."""
        for handle in self.isend_object(obj, dst):
            handle.wait()

    def isend_object(self, obj: Any, dst: int) -> list[Handle]:
        """Start sending to group rank `dst`; the handles keep the bytes alive."""
        self._other(dst, "dst")
        self._note("send_object", detail=f"dst={dst}")
        return objects.isend(self.cpu_communicator, obj, dst)

    def recv_object(self, src: int) -> Any:
        """The next object that group rank `src` sends to this rank."""
        self._other(src, "src")
        self._note("recv_object", detail=f"src={src}")
        return objects.recv(self.cpu_communicator, src)

    def irecv_object(self, src: int) -> objects.Incoming:
        """Start receiving the next object that group rank `src` sends to this rank; take it before the next is asked for."""
        self._other(src, "src")
        self._note("recv_object", detail=f"src={src}")
        return objects.Incoming(self.cpu_communicator, src)
