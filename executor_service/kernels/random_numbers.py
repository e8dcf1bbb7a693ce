"""Reproducible randomness: a number depends on its request's seed and position alone.

Philox 4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011), so a seeded answer is
the same in every batch, in every chunking, and after a preemption.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import numpy as np

_MULTIPLIERS: Final = (np.uint64(0xD2511F53), np.uint64(0xCD9E8D57))
_WEYL: Final = (0x9E3779B9, 0xBB67AE85)
_LOW: Final = np.uint64(0xFFFFFFFF)
_SHIFT: Final = np.uint64(32)


def uniform_numbers(seeds: Sequence[int], positions: Sequence[int]) -> np.ndarray:
    """One number in [0, 1) per (64-bit seed, position): float64 [R], 53 random bits each."""
    key = np.asarray(seeds, dtype=np.uint64)
    counter = np.asarray(positions, dtype=np.uint64)
    words = philox(counter, key)
    high, low = words[0], words[1]
    bits = ((high << _SHIFT) | low) >> np.uint64(11)
    return bits.astype(np.float64) * 2.0**-53


def philox(counter: np.ndarray, key: np.ndarray) -> list[np.ndarray]:
    """Ten rounds on the counter (c0, c1 from `counter`; c2, c3 zero); four 32-bit words as uint64 [R]."""
    zeros = np.zeros_like(counter)
    c0, c1, c2, c3 = counter & _LOW, counter >> _SHIFT, zeros, zeros
    k0, k1 = key & _LOW, key >> _SHIFT
    for _ in range(10):
        p0, p1 = _MULTIPLIERS[0] * c0, _MULTIPLIERS[1] * c2
        c0, c1, c2, c3 = (p1 >> _SHIFT) ^ c1 ^ k0, p1 & _LOW, (p0 >> _SHIFT) ^ c3 ^ k1, p0 & _LOW
        k0, k1 = (k0 + np.uint64(_WEYL[0])) & _LOW, (k1 + np.uint64(_WEYL[1])) & _LOW
    return [c0, c1, c2, c3]
