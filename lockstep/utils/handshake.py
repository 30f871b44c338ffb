"""Proving to each other, over a connection that anybody could have made, that both ends hold the same secret.

Each side sends a nonce; each answers with a proof over both nonces and all that it says. The secret itself never travels,
and a proof that was overheard is worth nothing on another connection, or from the other side.
"""

from __future__ import annotations

import hashlib
import hmac
import struct


def prove(key: str, who: str, *parts: bytes) -> bytes:
    """What only a holder of `key` can say. who: the side that says it, so that neither can hand the other's proof back."""
    whole = b"".join(struct.pack("<I", len(part)) + part for part in (who.encode(), *parts))
    return hmac.new(key.encode(), whole, hashlib.sha256).digest()


def proven(proof: bytes, key: str, who: str, *parts: bytes) -> bool:
    """Whether `proof` is right."""
    return hmac.compare_digest(proof, prove(key, who, *parts))
