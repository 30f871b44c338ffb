"""Functions that the tests of `run_ranks` itself run."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from typing import Any

import torch


def plain(rank: int, world_size: int, *args: Any) -> Any:
    return rank, world_size, args, torch.distributed.is_initialized(), torch.get_num_threads(), os.environ.get("JOB_COLOUR")


def raises_on_one(rank: int, world_size: int) -> None:
    print(f"rank {rank} says hello")
    if rank == 1:
        raise KeyError("the culprit")
    time.sleep(60)


def killed(rank: int, world_size: int) -> None:
    if rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(60)


def stuck(rank: int, world_size: int) -> None:
    if rank == 1:
        waits_for_nothing()


def waits_for_nothing() -> None:
    time.sleep(600)


def leaves_children(rank: int, world_size: int) -> int:
    return subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"]).pid


def pid(rank: int, world_size: int, path: str = "") -> int:
    if path:
        with open(f"{path}/{rank}", "w") as file:
            file.write(str(os.getpid()))
        time.sleep(600)
    return os.getpid()
