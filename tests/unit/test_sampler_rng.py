"""The counter-based generator: the paper's known answers, and independence of everything but (seed, choice, position)."""

from __future__ import annotations

import numpy as np
import pytest

from lockstep.worker.rng import philox4x32, uniforms


def words(*values: int) -> tuple[np.ndarray, ...]:
    return tuple(np.array([v], np.uint64) for v in values)


@pytest.mark.parametrize(
    ("counter", "key", "answer"),
    [  # kat_vectors of the authors' Random123 library, philox4x32-10
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_known_answers(counter: tuple[int, ...], key: tuple[int, ...], answer: tuple[int, ...]) -> None:
    got = philox4x32(words(*counter), words(*key))
    assert [int(w[0]) for w in got] == list(answer)


def test_uniform_in_range_and_flat() -> None:
    n = 20_000
    u = uniforms(np.full(n, 7), np.zeros(n, np.int64), np.arange(n))
    assert u.min() >= 0 and u.max() < 1
    counts = np.histogram(u, bins=100, range=(0, 1))[0]
    chi2 = ((counts - n / 100) ** 2 / (n / 100)).sum()
    assert chi2 < 160  # 99 degrees of freedom: p about 1e-4


@pytest.mark.parametrize("seed", [0, 1, -1, 2**63 - 1, -(2**63)])
def test_row_alone_equals_row_among_others(seed: int) -> None:
    seeds = np.array([3, seed, 5], np.int64)
    alone = uniforms(seeds[1:2], np.array([4]), np.array([99]))
    among = uniforms(seeds, np.array([1, 4, 2]), np.array([5, 99, 7]))
    assert alone[0] == among[1]


def test_each_word_of_the_counter_matters() -> None:
    base = (np.array([11]), np.array([2]), np.array([30]))
    draws = {float(uniforms(*base)[0])}
    for i in range(3):
        for bit in (0, 31, 32, 62):
            changed = [a.copy() for a in base]
            changed[i] = changed[i] ^ np.int64(1 << bit)
            draws.add(float(uniforms(*changed)[0]))
    assert len(draws) == 13
