"""The compact set of digests is a set."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from mobilellm.data.digests import DigestSet

NUMBERS = st.one_of(st.integers(1, 2**64 - 1), st.integers(1, 50), st.integers(1, 50).map(lambda i: i << 52))


@settings(deadline=None)
@given(st.lists(st.lists(NUMBERS, max_size=200), max_size=8))
def test_it_is_a_set(batches: list[list[int]]) -> None:
    digests, known = DigestSet(), set[int]()
    for batch in batches:
        expected = []
        for number in batch:
            expected.append(number not in known)
            known.add(number)
        assert digests.add(np.array(batch, dtype=np.uint64)).tolist() == expected
        assert len(digests) == len(known)


def test_zero_is_taken_for_one() -> None:
    digests = DigestSet()
    assert digests.add(np.array([0, 5], dtype=np.uint64)).tolist() == [True, True]
    assert digests.add(np.array([1, 0, 5], dtype=np.uint64)).tolist() == [False, False, False]


def test_memory() -> None:
    digests, random = DigestSet(), np.random.default_rng(0)
    for _ in range(50):
        digests.add(random.integers(1, 2**64 - 1, 10_000, dtype=np.uint64))
        if len(digests) > 20_000:
            assert 12 <= digests.bytes / len(digests) <= 24
    assert len(digests) == 500_000
