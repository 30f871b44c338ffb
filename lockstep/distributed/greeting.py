"""How a process on another host and its leader come to trust and suit each other, before anything else is said.

    leader                      guest
      Challenge  ------------->           a nonce; nothing else is said to a stranger
                 <-------------  Hello    who it is and what it runs, a nonce of its own, and proof of the key over all of it
      Welcome    ------------->           proof of the key the other way; or `Refused`, with the reason

The proof says who may take part. What follows is neither encrypted nor signed: it is for a network that is trusted. How the
messages are framed, and what follows, is the user's: `executor.node_wire` for hosts that share one engine's ranks,
`cluster.greeting` for those that keep whole replicas. No torch.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version

import msgspec

from lockstep.config.tree import EngineConfig
from lockstep.config.validate import settings as settings_of
from lockstep.utils.handshake import prove, proven
from lockstep.version import __version__

MESSAGE_BYTES = 64 << 10  # no message of a greeting is longer
NONCE_BYTES = 32


class Challenge(msgspec.Struct, tag="challenge", array_like=True):
    protocol: int
    nonce: bytes


class Identity(msgspec.Struct, array_like=True):
    """Who a guest is. number: of its host, or of the replica that it offers. name: one that no other guest has, where that counts.

    settings: what hosts must agree on, by name, as text.
    """

    number: int
    name: bytes
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


@dataclass(frozen=True)
class Sides:
    """What the two sides call themselves in their proofs, so that neither a proof nor a greeting fits another purpose."""

    leader: str
    guest: str

    def hello(self, challenge: Challenge, key: str, who: Identity) -> Hello:
        """The guest's answer."""
        nonce, said = os.urandom(NONCE_BYTES), msgspec.msgpack.encode(who)
        return Hello(nonce, said, prove(key, self.guest, challenge.nonce, nonce, said))

    def trusts(self, challenge: Challenge, key: str, hello: Hello) -> bool:
        """Whether the guest has the leader's key."""
        return proven(hello.proof, key, self.guest, challenge.nonce, hello.nonce, hello.identity)

    def welcome(self, challenge: Challenge, key: str, hello: Hello) -> Welcome:
        """The leader's answer to who suits it."""
        return Welcome(prove(key, self.leader, hello.nonce, challenge.nonce, hello.identity))

    def obeys(self, challenge: Challenge, key: str, hello: Hello, welcome: Welcome) -> bool:
        """Whether the leader has the guest's key."""
        return proven(welcome.proof, key, self.leader, hello.nonce, challenge.nonce, hello.identity)


def versions() -> tuple[str, str]:
    """(lockstep's, torch's) version here, without importing torch."""
    try:
        return __version__, version("torch")
    except PackageNotFoundError:
        return __version__, "none"


def introduce(number: int, settings: dict[str, str], name: bytes = b"") -> Identity:
    """This process as a guest."""
    return Identity(number, name, socket.gethostname(), os.getpid(), *versions(), settings)


def texts(config: EngineConfig, names: Collection[str]) -> dict[str, str]:
    """Settings of any part of the configuration, by name, as hosts compare them."""
    return {name: str(value) for name, _, value in settings_of(config) if name in names}


def misfit(who: Identity, own_versions: tuple[str, str], own: Mapping[str, str], host: str, words: Mapping[str, str] | None = None) -> str:
    """Why a guest cannot take part: the first difference, by name; "" when there is none.

    host: what a host is called ("node"). words: of a setting whose difference needs others, with {theirs} and {ours} in them.
    """
    for what, theirs, ours in zip(("lockstep", "torch"), (who.lockstep, who.torch), own_versions, strict=True):
        if theirs != ours:
            return f"it runs {what} {theirs} and the leader {ours}: install the same version on every {host}"
    for name in {**own, **who.settings}:
        theirs, ours = who.settings.get(name, "nothing"), own.get(name, "nothing")
        if theirs != ours and words and name in words:
            return words[name].format(theirs=theirs, ours=ours)
        if theirs != ours:
            return f"it has {name}={theirs} and the leader {name}={ours}: say the same on every {host}"
    return ""
