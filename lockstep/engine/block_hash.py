"""Names for the contents of KV blocks: a chained hash, so that equal names mean equal prefixes.

The keys and values in a block depend on every token before it. The name of a block is therefore
h(i) = H(h(i-1) || tokens of block i), with h(-1) made from what separates caches (the seed and the request's salt).
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Sequence

DIGEST_BYTES = 16


class BlockHasher:
    """Hashes blocks of `block_size` tokens. The same seed, salt and tokens give the same name on any machine."""

    def __init__(self, block_size: int, seed: int = 0) -> None:
        self.block_size = block_size
        self._seed = seed
        self._pack = struct.Struct(f"<{block_size}I").pack

    def root(self, salt: str | None) -> bytes:
        """The parent of a sequence's first block. Different salts never share a block."""
        text = f"lockstep kv {self._seed} {self.block_size} {'-' if salt is None else '+' + salt}"
        return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=DIGEST_BYTES).digest()

    def child(self, parent: bytes, tokens: Sequence[int]) -> bytes:
        """The name of the block that holds `tokens` (exactly block_size of them) after the block named `parent`."""
        return hashlib.blake2b(parent + self._pack(*tokens), digest_size=DIGEST_BYTES).digest()
