"""How the keeper of replicas on another host and the leader's router come to trust and suit each other.

The messages are those of `distributed.greeting`, after which `wire`'s follow: from there on a replica's process has the
connection. One connection for each start of each replica.
"""

from __future__ import annotations

import hashlib
import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import msgspec

from lockstep.config.model_spec import ModelSpec
from lockstep.config.tree import EngineConfig, ParallelConfig
from lockstep.distributed import greeting
from lockstep.distributed.greeting import MESSAGE_BYTES as MOST_BYTES
from lockstep.distributed.greeting import Challenge, Hello, Refused, Sides, Welcome, texts, versions
from lockstep.kernels.library import choose
from lockstep.utils.frames import NO_MESSAGE, receive_one, send_one

__all__ = ["MOST_BYTES", "Challenge", "Hello", "Refused", "Welcome", "versions"]  # of those that are not made here

Message = TypeVar("Message")
PROTOCOL = 1
LEADER, KEEPER = "dp-leader", "dp-keeper"
SIDES = Sides(LEADER, KEEPER)
SILENCE_S = 10.0
_SAMPLE_BYTES = 64 << 10
_OTHER_MODEL = "its model is another one (config.json and weights: {theirs}, the leader's {ours}): name the same model on every host"

# Settings that all hosts must say alike: they decide what a request's answer is, or which requests are taken.
AGREED = (
    *("nnodes", "data_parallel_size", "tensor_parallel_size", "pipeline_parallel_size", "prefill_context_parallel_size"),
    *("decode_context_parallel_size", "enable_expert_parallel", "dtype", "quantization", "seed", "max_model_len", "block_size"),
    *("enable_chunked_prefill", "scheduling_policy", "device"),
)


class Identity(greeting.Identity, array_like=True):
    """Who offers a replica."""

    @property
    def replica(self) -> int:
        return self.number

    @property
    def keeper(self) -> bytes:
        """A name that no other keeper has."""
        return self.name


class RefusedError(ConnectionError):
    """The leader does not take this replica, or is not one that we serve."""

    def __init__(self, reason: str, again: bool = False) -> None:
        super().__init__(reason)
        self.again = again


encode = msgspec.msgpack.Encoder().encode
decode_hello = msgspec.msgpack.Decoder(Hello).decode
decode_identity = msgspec.msgpack.Decoder(Identity).decode
_decode_challenge = msgspec.msgpack.Decoder(Challenge).decode
_decode_answer = msgspec.msgpack.Decoder(Welcome | Refused).decode


def silence_s(parallel: ParallelConfig) -> float:
    """A host that answers nothing for so long is lost."""
    return float(getattr(parallel, "node_timeout_seconds", SILENCE_S))


def agreed_settings(config: EngineConfig, spec: ModelSpec, folder: Path) -> dict[str, str]:
    """What all hosts must say alike, by name, of a configuration as `resolve` returns it.

    The model counts by what is in its folder, which may be somewhere else on every host.
    """
    dummy = config.model.load_format == "dummy"
    found = texts(config, AGREED)
    found["load_format"] = "dummy" if dummy else "safetensors"
    found["model"] = _fingerprint(spec, None if dummy else folder)
    if config.runtime.device == "cpu":  # replicas with other kernels would give other bits
        variant = choose()
        found["LOCKSTEP_KERNELS"] = variant.name if variant else "torch"
    return found


def misfit(who: Identity, own_versions: tuple[str, str], own: dict[str, str]) -> str:
    """Why replicas of this host cannot be part of ours: the first difference, by name; "" when there is none."""
    return greeting.misfit(who, own_versions, own, "host", {"model": _OTHER_MODEL})


def greet(connection: socket.socket, key: str, identity: Identity, deadline_s: float) -> None:
    """The keeper's side. Raises RefusedError, or OSError when the other side is no leader, or is too slow."""
    challenge = _read(connection, _decode_challenge, deadline_s)
    if challenge.protocol != PROTOCOL:
        raise RefusedError(
            f"the leader speaks protocol {challenge.protocol} and this host {PROTOCOL}: install the same version on every host"
        )
    hello = SIDES.hello(challenge, key, identity)
    send_one(connection, encode(hello), deadline_s)
    answer = _read(connection, _decode_answer, deadline_s)
    if isinstance(answer, Refused):
        raise RefusedError(answer.reason, answer.again)
    if not SIDES.obeys(challenge, key, hello, answer):
        raise RefusedError("the leader does not have this host's LOCKSTEP_CLUSTER_KEY: set the same one on every host")


def _read(connection: socket.socket, decode: Callable[[bytes], Message], deadline_s: float) -> Message:
    try:
        return decode(receive_one(connection, deadline_s, MOST_BYTES))
    except NO_MESSAGE as error:
        raise ConnectionAbortedError(f"what it says is no greeting of ours ({error})") from None


def _fingerprint(spec: ModelSpec, folder: Path | None) -> str:
    """Of the model's numbers, and of its weight files: names, sizes, first and last bytes. Cheap on any size of model."""
    digest = hashlib.blake2b(msgspec.msgpack.encode(spec), digest_size=8)
    for path in sorted(folder.glob("*.safetensors")) if folder is not None else ():
        with path.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            digest.update(f"{path.name}:{size}".encode())
            for start in (0, max(0, size - _SAMPLE_BYTES)):
                file.seek(start)
                digest.update(file.read(_SAMPLE_BYTES))
    return digest.hexdigest()
