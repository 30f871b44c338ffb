"""Every environment variable that lockstep reads, in one place."""

from __future__ import annotations

import os
from pathlib import Path


def _text(name: str, default: str = "") -> str:
    return os.environ.get(name, default).strip()


def host_ip() -> str:
    """LOCKSTEP_HOST_IP: the address other hosts reach this one at; empty means find it."""
    return _text("LOCKSTEP_HOST_IP")


def cluster_key() -> str:
    """LOCKSTEP_CLUSTER_KEY: a secret that all hosts of one engine share and prove to each other; empty means none."""
    return _text("LOCKSTEP_CLUSTER_KEY")


def api_keys() -> list[str]:
    """LOCKSTEP_API_KEY: key(s) that the server asks its clients for, with spaces between; unlike a flag, other users cannot read it."""
    return _text("LOCKSTEP_API_KEY").split()


_OWN_TO_HOST = ("HOST_IP", "HOST_ID", "INTERFACE", "PORT", "CACHE", "CLUSTER_KEY", "API_KEY")


def for_other_hosts() -> dict[str, str]:
    """The LOCKSTEP_ variables that are set here and mean the same on another host."""
    own = {f"LOCKSTEP_{name}" for name in _OWN_TO_HOST}
    return {name: text for name, text in os.environ.items() if name.startswith("LOCKSTEP_") and name not in own}


def ray_address() -> str:
    """RAY_ADDRESS: the Ray cluster to use; empty means one that was started on this host."""
    return _text("RAY_ADDRESS")


def rendezvous_port() -> int:
    """LOCKSTEP_PORT: the port on which rank 0 serves the rendezvous for other hosts; 0, or unset, means any that is free.

    Raises ValueError for what is no port.
    """
    text = _text("LOCKSTEP_PORT", "0") or "0"
    if not (text.isascii() and text.isdigit() and len(text) < 9 and int(text) < 65536):
        raise ValueError(f"LOCKSTEP_PORT={text!r} is no port: it must be a whole number from 1 to 65535; unset it for any free one.")
    return int(text)


def network_interface() -> str:
    """LOCKSTEP_INTERFACE: the interface ranks talk over; empty means loopback on one host, else the route's."""
    return _text("LOCKSTEP_INTERFACE")


def columns() -> str:
    """COLUMNS: how wide the terminal is, where somebody says so; empty means ask the terminal."""
    return _text("COLUMNS")


def cuda_visible_devices() -> str | None:
    """CUDA_VISIBLE_DEVICES as set, None when unset."""
    return os.environ.get("CUDA_VISIBLE_DEVICES")


def hub_offline() -> bool:
    """HF_HUB_OFFLINE: whether the model hub must not be asked."""
    return _text("HF_HUB_OFFLINE") not in ("", "0")


def openai_api_key() -> str:
    """OPENAI_API_KEY: a client's key; empty means none."""
    return _text("OPENAI_API_KEY")


def torchrun_rank() -> tuple[int, int, int] | None:
    """(RANK, LOCAL_RANK, WORLD_SIZE) as torchrun sets them, None when not started by it."""
    if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
        return None
    return int(os.environ["RANK"]), int(os.environ.get("LOCAL_RANK", "0")), int(os.environ["WORLD_SIZE"])


def launcher_variables() -> dict[str, str]:
    """What torchrun tells each process about its place; empty text for what is not set."""
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    return {name: _text(name) for name in names}


def check_collectives() -> bool:
    """LOCKSTEP_CHECK_COLLECTIVES: whether ranks compare their collectives even where the flag does not say so."""
    return _text("LOCKSTEP_CHECK_COLLECTIVES") not in ("", "0")


def debug_fault() -> str:
    """LOCKSTEP_FAULT: `phase:rank:action`, a fault that tests inject; empty in normal life."""
    return _text("LOCKSTEP_FAULT")


def child_environment(**changes: str) -> dict[str, str]:
    """This process's environment for a child, with `changes`. The server's keys are not for those who run the model."""
    return {name: text for name, text in os.environ.items() if name != "LOCKSTEP_API_KEY"} | changes


def master_address() -> tuple[str, int] | None:
    """(MASTER_ADDR, MASTER_PORT), None when either is unset."""
    if not _text("MASTER_ADDR") or not _text("MASTER_PORT").isdigit():
        return None
    return _text("MASTER_ADDR"), int(_text("MASTER_PORT"))


def has_agent_store() -> bool:
    """TORCHELASTIC_USE_AGENT_STORE: torchrun already serves a store at the master address."""
    return _text("TORCHELASTIC_USE_AGENT_STORE").lower() == "true"


def restart_count() -> int:
    """TORCHELASTIC_RESTART_COUNT: which attempt of torchrun this is."""
    return int(_text("TORCHELASTIC_RESTART_COUNT", "0") or 0)


def gloo_interfaces() -> str:
    """GLOO_SOCKET_IFNAME: names of interfaces separated by commas, "" when gloo is to take the host name's."""
    return _text("GLOO_SOCKET_IFNAME")


_SOCKET_INTERFACES = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")


def bind_collectives(interface: str) -> list[str]:
    """Name the interface for gloo and NCCL, which read it from the environment only; a user's own choice stays.

    Returns the variables that were set, for `unbind_collectives`.
    """
    chosen = [name for name in _SOCKET_INTERFACES if not _text(name)]
    for name in chosen:
        os.environ[name] = interface
    return chosen


def unbind_collectives(names: list[str]) -> None:
    """Undo `bind_collectives`."""
    for name in names:
        os.environ.pop(name, None)


def log_format() -> str:
    """LOCKSTEP_LOG_FORMAT: text (the default) or json; `--log-format` sets it for this process and those it starts."""
    return _text("LOCKSTEP_LOG_FORMAT", "text").lower()


def choose_log_format(name: str) -> None:
    """Set LOCKSTEP_LOG_FORMAT."""
    os.environ["LOCKSTEP_LOG_FORMAT"] = name


def no_color() -> bool:
    """NO_COLOR: whether the user asked programs for plain text (https://no-color.org)."""
    return bool(_text("NO_COLOR"))


def kernels() -> str:
    """LOCKSTEP_KERNELS: the variant of the CPU kernels to run, or torch for none of them; empty means the best one."""
    return _text("LOCKSTEP_KERNELS").lower()


def cxx() -> str:
    """CXX: the C++ compiler's command; empty means find one."""
    return _text("CXX")


def cache_folder() -> Path:
    """LOCKSTEP_CACHE, else the user's cache folder (https://specifications.freedesktop.org/basedir-spec) + "lockstep"."""
    chosen = _text("LOCKSTEP_CACHE")
    if chosen:
        return Path(chosen)
    return Path(_text("XDG_CACHE_HOME") or Path.home() / ".cache") / "lockstep"


def loose_atoms() -> bool:
    """LOCKSTEP_LOOSE_ATOMS: sum each rank's columns in one go, which gives up equal bits; for measuring what they cost."""
    return _text("LOCKSTEP_LOOSE_ATOMS") not in ("", "0")


def communicator() -> str:
    """LOCKSTEP_COMMUNICATOR: what moves host tensors between ranks: auto (the default), gloo, shm or hierarchical."""
    return _text("LOCKSTEP_COMMUNICATOR", "auto").lower() or "auto"


def host_id() -> str:
    """LOCKSTEP_HOST_ID: ranks that give the same one share memory; empty means find out."""
    return _text("LOCKSTEP_HOST_ID")


_MATTER = ("LOCKSTEP_", "NCCL_", "GLOO_", "TORCH", "OMP_", "MKL_", "CUDA_", "HF_", "RAY_", "MASTER_", "OTEL_", "PYTORCH_", "VLLM_")
_SECRET = ("KEY", "TOKEN", "SECRET", "PASSWORD", "HEADERS")


def that_matter() -> dict[str, str]:
    """The variables that change what lockstep or its libraries do; what may be secret is not told."""
    names = sorted(n for n in os.environ if n.startswith(_MATTER) or n in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LD_PRELOAD", "CXX"))
    return {n: "(set)" if any(word in n for word in _SECRET) else os.environ[n] for n in names}
