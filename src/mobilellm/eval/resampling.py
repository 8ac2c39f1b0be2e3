"""Bootstrap resamples of rows that belong together, and what they say: intervals and p values."""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

LEVEL = 0.95
"""Of every interval."""
_AT_ONCE = 2**22
"""Numbers of resampling weights held at a time: 32 MiB."""


def resampled_sums(values: Array, samples: int, generator: np.random.Generator) -> Array:
    """Sums of `samples` bootstrap resamples of the rows of (N, K) values: (samples, K).

    A resample draws N rows with replacement, i.e. gives each a multinomial count; equal rows share one. The
    draws depend on which rows are equal, and on nothing else of their values: those of -x are minus those
    of x, and rows that belong together stay together.
    """
    _, first, counts = np.unique(values, axis=0, return_index=True, return_counts=True)
    order = np.argsort(first)
    kept, chances = values[first[order]], counts[order] / len(values)
    parts = [
        generator.multinomial(len(values), chances, size=size) @ kept
        for size in _parts(samples, max(1, _AT_ONCE // len(kept)))
    ]
    return np.concatenate(parts)


def mcnemar(won: int, lost: int) -> float:
    """Exact two-sided p of McNemar's test: of won + lost coin flips, as uneven a split or more."""
    flips = won + lost
    if won == lost:
        return 1.0
    terms = [_log_choose(flips, k) - flips * math.log(2) for k in range(min(won, lost) + 1)]
    return min(1.0, 2 * math.fsum(map(math.exp, terms)))


def interval(values: Array) -> tuple[float, float]:
    """Percentiles: the middle 95 % of the resamples."""
    low, high = np.quantile(values, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


def bootstrap_p(differences: Array) -> float:
    """Twice the share of resamples on the rarer side of 0, one added: never 0, which no sample could show."""
    below, above = int((differences <= 0).sum()), int((differences >= 0).sum())
    return min(1.0, 2 * (min(below, above) + 1) / (len(differences) + 1))


def generator_of(seed: int, name: str) -> np.random.Generator:
    """Of a task of its own, so that one task more or less leaves the others as they are."""
    return np.random.default_rng([seed, zlib.crc32(name.encode())])


def _parts(total: int, most: int) -> Iterator[int]:
    for start in range(0, total, most):
        yield min(most, total - start)


def _log_choose(n: int, k: int) -> float:
    return math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1)
