"""How sure a share or a mean is: 95 % intervals."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from mobilellm.eval.resampling import interval, resampled_sums

_NORMAL = 1.959963984540054
"""Standard deviations either side that hold 95 %."""
_SAMPLES, _SEED = 10_000, 0


def wilson(right: int, count: int) -> tuple[float, float]:
    """Of a share of independent questions: Wilson's score interval (1927), sound at 0 and 1 as well.

    Of none right it begins at 0 exactly, of all right it ends at 1: what rounding leaves there is no share.
    """
    share, spread = right / count, _NORMAL**2 / count
    middle = (share + spread / 2) / (1 + spread)
    half = _NORMAL * math.sqrt(share * (1 - share) / count + spread / (4 * count)) / (1 + spread)
    return middle - half if right else 0.0, middle + half if right < count else 1.0


def clustered(
    values: Sequence[float], groups: Sequence[int], weights: Sequence[float] | None = None
) -> tuple[float, float] | None:
    """Of a mean of values that come in groups, as turns of one conversation do: groups are resampled.

    Percentiles of 10,000 bootstrap resamples from a fixed seed. `weights` are those of the mean, by default
    1 each. None of a single group, of which nothing can be said.
    """
    sums: dict[int, list[float]] = {}
    for value, group, weight in zip(values, groups, weights or [1.0] * len(values), strict=True):
        total = sums.setdefault(group, [0.0, 0.0])
        total[0] += value * weight
        total[1] += weight
    if len(sums) < 2:
        return None
    drawn = resampled_sums(np.array(list(sums.values())), _SAMPLES, np.random.default_rng(_SEED))
    return interval(drawn[:, 0] / drawn[:, 1])
