"""What a forked rank does: set itself up, call the function, report, leave without a trace."""

from __future__ import annotations

import contextlib
import ctypes
import faulthandler
import importlib
import os
import signal
import sys
import time
import traceback
from typing import Any, NoReturn

import msgspec

from lockstep.utils.net import Listener

_PR_SET_PDEATHSIG = 1


def rank_main(request: dict[str, Any], rank: int, listener: Listener, pipe: int, output: int, parent: int) -> NoReturn:
    """The whole life of a rank. Ends the process."""
    try:
        _settle(output, parent, request["environ"])
        report = _call(request, rank, listener)
    except BaseException as error:
        report = {
            "ok": False,
            "error_type": type(error).__name__,
            "message": str(error),
            "traceback": traceback.format_exc(),
            "when": time.time(),
        }
    with contextlib.suppress(Exception):
        sys.stdout.flush()
        sys.stderr.flush()
    data = memoryview(msgspec.msgpack.encode(report))
    while data:
        data = data[os.write(pipe, data) :]
    # No interpreter shutdown: it would run the zygote's exit handlers, and may hang in a broken collective.
    os._exit(0)


def _settle(output: int, parent: int, environ: dict[str, str]) -> None:
    os.setpgid(0, 0)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)
    for fd in (1, 2):
        os.dup2(output, fd)
    faulthandler.enable()
    faulthandler.register(signal.SIGUSR1, all_threads=True)
    os.environ.update(environ)


def _call(request: dict[str, Any], rank: int, listener: Listener) -> dict[str, Any]:
    import torch

    from lockstep.distributed import codec, parallel_state, rendezvous

    torch.set_num_threads(1)
    world_size = int(request["world_size"])
    module, _, name = request["function"].partition(":")
    args = codec.decode(request["args"])
    function = getattr(importlib.import_module(module), name)
    if not request["init"]:
        listener.close()
        return {"ok": True, "value": codec.encode(function(rank, world_size, *args))}
    fd = listener.detach() if rank == 0 else None
    port = listener.port
    if rank != 0:
        listener.close()
    rendezvous.join(rank, world_size, rank, "127.0.0.1", port, fd, request["backend"], timeout_s=min(60.0, float(request["timeout"])))
    value = codec.encode(function(rank, world_size, *args))
    # Rank 0 serves the store: it leaves when all are done with it.
    if parallel_state.find_group("world") is not None:
        parallel_state.get_world_group().barrier()
    parallel_state.cleanup_dist_env_and_memory()
    return {"ok": True, "value": value}
