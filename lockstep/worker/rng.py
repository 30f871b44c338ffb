"""Random numbers that depend on the request alone: a counter-based generator, one number per (seed, choice, position).

A draw never depends on a generator's state, so no batch, split, preemption or restart can change it. The generator is
Philox4x32-10 of Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (SC 2011), in the paper's notation:
a 128-bit counter is mixed with a 64-bit key in ten rounds of two 32 x 32 -> 64 bit multiplications.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

U64 = npt.NDArray[np.uint64]

_M0, _M1 = np.uint64(0xD2511F53), np.uint64(0xCD9E8D57)  # the round multipliers
_W0, _W1 = np.uint64(0x9E3779B9), np.uint64(0xBB67AE85)  # the Weyl sequence that bumps the key
_LOW = np.uint64(0xFFFFFFFF)
_32 = np.uint64(32)
_ROUNDS = 10


def philox4x32(counter: tuple[U64, U64, U64, U64], key: tuple[U64, U64]) -> tuple[U64, U64, U64, U64]:
    """Philox4x32-10 on arrays: every word is a uint64 array holding 32-bit values; the result likewise."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(_ROUNDS):
        p0, p1 = _M0 * c0, _M1 * c2
        c0, c1, c2, c3 = (p1 >> _32) ^ c1 ^ k0, p1 & _LOW, (p0 >> _32) ^ c3 ^ k1, p0 & _LOW
        k0, k1 = (k0 + _W0) & _LOW, (k1 + _W1) & _LOW
    return c0, c1, c2, c3


def uniforms(seeds: npt.NDArray[np.int64], choices: npt.NDArray[np.int64], positions: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
    """One number in [0, 1) per row, with 53 random bits: the key is the seed, the counter is (position, choice).

    seeds, choices, positions: [rows]; a position is the index, in prompt and output, of the token to be drawn.
    """
    key = seeds.astype(np.int64).view(np.uint64)
    place = positions.astype(np.int64).view(np.uint64)
    choice = choices.astype(np.int64).view(np.uint64)
    words = philox4x32((place & _LOW, place >> _32, choice & _LOW, choice >> _32), (key & _LOW, key >> _32))
    bits = (words[0] << np.uint64(21)) | (words[1] >> np.uint64(11))
    return bits.astype(np.float64) * 2.0**-53
