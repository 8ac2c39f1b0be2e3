"""A random order of any number of things that takes no memory: a keyed permutation of 0 … size - 1.

A Feistel network (Luby & Rackoff 1988) over the next power of four permutes whole numbers without a table;
what falls outside goes through it again until it is inside (cycle walking: Black & Rogaway 2002). A trillion
tokens in windows of 2,048 would need an array of four gigabytes otherwise.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

_ROUNDS = 6
_MULTIPLIERS = np.array([0xBF58476D1CE4E5B9, 0x94D049BB133111EB], dtype=np.uint64)  # of SplitMix64


def permuted(indices: NDArray[np.int64], size: int, key: Sequence[int]) -> NDArray[np.int64]:
    """Where each index (any shape, 0 … size - 1) goes: a bijection that depends on `size` and `key` alone.

    Pinned by a test: another order after an update would break the resumption of every run.
    """
    half = np.uint64(max(1, (max(size - 1, 1).bit_length() + 1) // 2))  # bits of each half
    keys = np.random.PCG64(list(key)).random_raw(_ROUNDS)  # numpy keeps raw bits the same in every version
    out = indices.astype(np.uint64)
    outside = np.ones(out.shape, dtype=bool)
    while outside.any():
        out[outside] = _feistel(out[outside], half, keys)
        outside = out >= size
    return out.astype(np.int64)


def _feistel(values: NDArray[np.uint64], half: np.uint64, keys: NDArray[np.uint64]) -> NDArray[np.uint64]:
    mask = (np.uint64(1) << half) - np.uint64(1)
    left, right = values >> half, values & mask
    for key in keys:
        left, right = right, left ^ (_mixed(right ^ key) & mask)
    return (left << half) | right


def _mixed(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The finaliser of SplitMix64 (Steele, Lea & Flood 2014); numpy's unsigned products wrap around."""
    values = (values ^ (values >> np.uint64(30))) * _MULTIPLIERS[0]
    values = (values ^ (values >> np.uint64(27))) * _MULTIPLIERS[1]
    return values ^ (values >> np.uint64(31))
