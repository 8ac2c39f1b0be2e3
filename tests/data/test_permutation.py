"""The order of the data: a permutation, the same for ever, without visible structure, without memory."""

from __future__ import annotations

import time
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from mobilellm.data.permutation import permuted


def order(size: int, *key: int) -> NDArray[np.int64]:
    return permuted(np.arange(size), size, key)


@settings(deadline=None)
@given(st.integers(1, 5000), st.lists(st.integers(0, 2**63), min_size=1, max_size=4))
def test_it_is_a_permutation(size: int, key: list[int]) -> None:
    assert np.array_equal(np.sort(order(size, *key)), np.arange(size))


@pytest.mark.parametrize("size", [2**k + d for k in (1, 2, 5, 8, 12, 16) for d in (-1, 0, 1)])
def test_around_powers_of_two(size: int) -> None:
    """Where the domain of the network changes its size."""
    assert np.array_equal(np.sort(order(size, 3)), np.arange(size))


@settings(deadline=None)
@given(st.integers(1, 2**62), st.data())
def test_every_part_of_it_is_the_same_as_all_of_it(size: int, data: st.DataObject) -> None:
    """An index goes where it goes whatever it is asked together with; different ones go to different places."""
    indices = data.draw(st.lists(st.integers(0, size - 1), min_size=1, max_size=30, unique=True))
    together = permuted(np.array(indices), size, [7, 1])
    assert together.dtype == np.int64
    assert ((together >= 0) & (together < size)).all()
    assert len(set(together.tolist())) == len(indices)
    assert [int(permuted(np.array([index]), size, [7, 1])[0]) for index in indices] == together.tolist()


def test_any_shape() -> None:
    indices = np.arange(12).reshape(3, 4)
    assert np.array_equal(permuted(indices, 12, [1]).ravel(), order(12, 1))
    assert permuted(np.array([], dtype=np.int64), 12, [1]).shape == (0,)


def test_the_same_for_ever() -> None:
    """Pinned: another order after an update would break the resumption of every run."""
    assert order(16, 0, 0, 0).tolist() == PINNED[16]
    assert permuted(np.arange(5), 1_000_003, [42, 1, 2]).tolist() == PINNED[1_000_003]
    assert permuted(np.arange(5), 488_281_250, [2**63, 0, 9]).tolist() == PINNED[488_281_250]


PINNED = {
    16: [2, 13, 1, 11, 10, 5, 7, 8, 9, 6, 15, 14, 3, 12, 0, 4],
    1000003: [949417, 678967, 364263, 163635, 144914],
    488281250: [458872500, 390901476, 352412637, 376372098, 241381685],
}


def test_no_structure_can_be_seen() -> None:
    """Of 100,000 things: where one goes tells nothing of where the next goes, or the same one by another key."""
    size = 100_000
    places = np.arange(size)
    bound = 5 / np.sqrt(size)  # five standard deviations of a sample correlation
    for key in range(5):
        out, other = order(size, key, 0), order(size, key, 1)
        pairs = {
            "with its place": (out, places),
            "with the next": (out[1:], out[:-1]),
            "with the one after the next": (out[2:], out[:-2]),
            "with the next epoch": (out, other),
            "with the next seed": (out, order(size, key + 1, 0)),
            "of distances": (np.abs(np.diff(out))[1:], np.abs(np.diff(out))[:-1]),
        }
        for name, (a, b) in pairs.items():
            limit = 1.5 * bound if name == "of distances" else bound  # two of these share a member
            expected = 0.1 if name == "of distances" else 0.0
            assert abs(np.corrcoef(a, b)[0, 1] - expected) < limit, (name, key)
        for bit in range(1, 5):  # low and high bits are as evenly spread
            halves = np.add.reduceat(out & bit > 0, np.arange(0, size, 1000))
            assert abs(halves.mean() - 1000 * np.mean(places & bit > 0)) < 10, (bit, key)
        counts = np.bincount(out[:10_000] // 1000, minlength=100)  # a tenth of it comes from everywhere
        assert 50 < ((counts - 100) ** 2 / 100).sum() < 170  # chi square of 99 degrees of freedom


def test_small_ones_have_all_orders() -> None:
    """Of four things, 24; each about as often over the keys."""
    orders = [tuple(order(4, key).tolist()) for key in range(2400)]
    counts = [orders.count(each) for each in set(orders)]
    assert len(counts) == 24
    assert 50 < min(counts) <= max(counts) < 170


def test_a_trillion_tokens_take_no_memory_and_no_time() -> None:
    """5e8 windows: a step of 1,024 in a few milliseconds, wherever in the epoch; a table would be 4 GB."""
    size, indices = 500_000_000, np.arange(499_998_000, 499_999_024)
    permuted(indices, size, [0, 0, 0])
    tracemalloc.start()
    seconds = []
    for epoch in range(20):
        started = time.process_time()
        permuted(indices, size, [0, 0, epoch])
        seconds.append(time.process_time() - started)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1_000_000
    assert min(seconds) < 0.01
