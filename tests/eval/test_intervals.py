from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from scipy.stats import binomtest

from mobilellm.eval.intervals import clustered, wilson


def interval(*arguments: Any) -> tuple[float, float]:
    found = clustered(*arguments)
    assert found is not None
    return found


@pytest.mark.parametrize(("right", "count"), [(0, 5), (5, 5), (1, 1), (37, 200), (399, 400)])
def test_wilson_as_scipy_has_it(right: int, count: int) -> None:
    expected = binomtest(right, count).proportion_ci(0.95, "wilson")
    assert wilson(right, count) == pytest.approx((expected.low, expected.high), abs=1e-12)


@pytest.mark.parametrize("count", [1, 2, 3, 7, 40, 100, 1000, 12_345])
def test_the_ends_of_a_share_are_exact(count: int) -> None:
    """No 8.7e-19 where none is right, no 1 - 1e-16 where all are; a nearby share keeps off the end."""
    assert wilson(0, count)[0] == 0.0 < wilson(0, count)[1]
    assert wilson(count, count)[1] == 1.0 > wilson(count, count)[0]
    if count > 1:
        assert 0 < wilson(1, count)[0] < wilson(1, count)[1] < 1


def test_clustered_is_as_wide_as_theory_has_it() -> None:
    values = np.random.default_rng(1).normal(3, 2, 400)
    low, high = interval(list(values), range(400))
    half = 1.96 * values.std() / 20
    assert (low, high) == pytest.approx((values.mean() - half, values.mean() + half), abs=0.02)
    assert clustered(list(values), range(400)) == (low, high)  # of one seed


def test_values_that_come_together_count_once() -> None:
    values = list(np.random.default_rng(1).normal(3, 2, 100))
    alone = interval(values, range(100))
    doubled = interval(values * 4, [*range(100)] * 4)
    assert doubled == pytest.approx(alone, abs=1e-9)
    low, high = interval(values * 4, range(400))
    assert high - low < 0.6 * (alone[1] - alone[0])


def test_a_weight_is_so_many_copies() -> None:
    draw = np.random.default_rng(1)
    values, weights, groups = draw.normal(3, 2, 40), draw.integers(1, 5, 40), np.arange(40) // 2
    found = interval(list(values), groups.tolist(), weights.tolist())
    copies = interval(list(np.repeat(values, weights)), np.repeat(groups, weights).tolist())
    assert found == pytest.approx(copies, abs=1e-9)
    assert found != pytest.approx(interval(list(values), groups.tolist()), abs=1e-3)


def test_of_a_single_group_nothing_can_be_said() -> None:
    assert clustered([1.0, 0.0], [0, 0], [3.0, 1.0]) is None
