"""How the keeper of replicas on another host and the leader's router come to trust and suit each other.

    leader                      keeper
      Challenge  ------------->           a nonce; nothing else is said to a stranger
                 <-------------  Hello    who it is and what it runs, a nonce of its own, and proof of the key over all of it
      Welcome    ------------->           proof of the key the other way; or `Refused`, with the reason
                 <------------>           `wire`'s messages: from here on a replica's process has the connection

One connection for each start of each replica. The proof says who may take part; what follows is neither encrypted nor signed:
it is for a network that is trusted.
"""

from __future__ import annotations

import hashlib
import os
import socket
from collections.abc import Callable
from dataclasses import fields
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from lockstep.config.model_spec import ModelSpec
from lockstep.config.tree import EngineConfig, ParallelConfig
from lockstep.kernels.library import choose
from lockstep.utils.frames import NO_MESSAGE, receive_one, send_one
from lockstep.utils.handshake import prove, proven
from lockstep.version import __version__

Message = TypeVar("Message")
PROTOCOL = 1
MOST_BYTES = 64 << 10  # of one message of the greeting
LEADER, KEEPER = "dp-leader", "dp-keeper"
SILENCE_S = 10.0
_SAMPLE_BYTES = 64 << 10

# Settings that all hosts must say alike: they decide what a request's answer is, or which requests are taken.
AGREED = (
    *("data_parallel_size", "tensor_parallel_size", "pipeline_parallel_size", "prefill_context_parallel_size"),
    *("decode_context_parallel_size", "enable_expert_parallel", "dtype", "quantization", "seed", "max_model_len", "block_size"),
    *("enable_chunked_prefill", "scheduling_policy", "device"),
)


class Challenge(msgspec.Struct, tag="challenge", array_like=True):
    protocol: int
    nonce: bytes


class Identity(msgspec.Struct, array_like=True):
    """Who offers a replica. keeper: a name that no other keeper has. settings: see `agreed_settings`."""

    replica: int
    keeper: bytes
    host: str
    pid: int
    lockstep: str
    torch: str
    settings: dict[str, str]


class Hello(msgspec.Struct, tag="hello", array_like=True):
    nonce: bytes
    identity: bytes  # an encoded Identity: the proof is over these very bytes
    proof: bytes


class Welcome(msgspec.Struct, tag="welcome", array_like=True):
    proof: bytes


class Refused(msgspec.Struct, tag="refused", array_like=True):
    """again: the reason may pass."""

    reason: str
    again: bool = False


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


def versions() -> tuple[str, str]:
    """(lockstep's, torch's) version here, without importing torch."""
    try:
        return __version__, version("torch")
    except PackageNotFoundError:
        return __version__, "none"


def agreed_settings(config: EngineConfig, spec: ModelSpec, folder: Path) -> dict[str, str]:
    """What all hosts must say alike, by name, of a configuration as `resolve` returns it.

    The model counts by what is in its folder, which may be somewhere else on every host.
    """
    groups: list[Any] = [config.model, config.parallel, config.cache, config.scheduler, config.runtime]
    where = {f.name: getattr(group, f.name) for group in groups for f in fields(group)}
    dummy = config.model.load_format == "dummy"
    found = {name: str(where[name]) for name in AGREED}
    found["load_format"] = "dummy" if dummy else "safetensors"
    found["model"] = _fingerprint(spec, None if dummy else folder)
    if config.runtime.device == "cpu":  # replicas with other kernels would give other bits
        variant = choose()
        found["LOCKSTEP_KERNELS"] = variant.name if variant else "torch"
    return found


def misfit(who: Identity, own_versions: tuple[str, str], own: dict[str, str]) -> str:
    """Why replicas of this host cannot be part of ours: the first difference, by name; "" when there is none."""
    for what, theirs, ours in zip(("lockstep", "torch"), (who.lockstep, who.torch), own_versions, strict=True):
        if theirs != ours:
            return f"it runs {what} {theirs} and the leader {ours}: install the same version on every host"
    for name in {**own, **who.settings}:
        theirs, ours = who.settings.get(name, "nothing"), own.get(name, "nothing")
        if theirs != ours and name == "model":
            return f"its model is another one (config.json and weights: {theirs}, the leader's {ours}): name the same model on every host"
        if theirs != ours:
            return f"it has {name}={theirs} and the leader {name}={ours}: say the same on every host"
    return ""


def greet(connection: socket.socket, key: str, identity: Identity, deadline_s: float) -> None:
    """The keeper's side. Raises RefusedError, or OSError when the other side is no leader, or is too slow."""
    challenge = _read(connection, _decode_challenge, deadline_s)
    if challenge.protocol != PROTOCOL:
        raise RefusedError(
            f"the leader speaks protocol {challenge.protocol} and this host {PROTOCOL}: install the same version on every host"
        )
    nonce, body = os.urandom(32), encode(identity)
    send_one(connection, encode(Hello(nonce, body, prove(key, KEEPER, challenge.nonce, nonce, body))), deadline_s)
    answer = _read(connection, _decode_answer, deadline_s)
    if isinstance(answer, Refused):
        raise RefusedError(answer.reason, answer.again)
    if not proven(answer.proof, key, LEADER, nonce, challenge.nonce, body):
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
