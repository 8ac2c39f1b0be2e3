"""Trees that answer every request once, and what they save."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from mobilellm.eval.interface import Request
from mobilellm.eval.prefix_tree import PrefixTree, grow

TOKENS = st.lists(st.integers(0, 2), min_size=1, max_size=7).map(tuple)
REQUESTS = st.lists(st.builds(Request, TOKENS, TOKENS), max_size=14)
"""Of three tokens only, so that many begin alike."""
ALWAYS_SHARE = 1e9


def ancestors(tree: PrefixTree, node: int) -> list[int]:
    """The nodes that `node` may look at, itself included, by the rule that masks follow."""
    return [other for other in range(len(tree)) if other <= node < tree.ends[other]]


@settings(deadline=None, max_examples=100)
@given(REQUESTS, st.integers(1, 40), st.sampled_from([0.0, 1.0, 20.0, ALWAYS_SHARE]))
def test_every_request_finds_its_own_tokens(requests: list[Request], most: int, worth: float) -> None:
    trees = list(grow(requests, most, worth))
    assert sorted(place.request for tree in trees for place in tree.places) == list(range(len(requests)))
    for tree in trees:
        fed = set()
        for number, nodes in tree.places:
            context, continuation = requests[number]
            assert len(nodes) == len(continuation)
            seen = ancestors(tree, int(nodes[-1]))
            assert tuple(tree.tokens[seen]) == (*context, *continuation[:-1])
            assert list(tree.depths[seen]) == list(range(len(seen)))
            assert seen[len(context) - 1 :] == list(nodes)
            fed.add((*context, *continuation[:-1]))
        assert len(tree) <= most or len(fed) == 1
        assert tree.is_chain == all(tree.ends == len(tree))


@settings(deadline=None, max_examples=100)
@given(REQUESTS)
def test_equal_beginnings_are_fed_once(requests: list[Request]) -> None:
    beginnings = set()
    for context, continuation in requests:
        fed = (*context, *continuation[:-1])
        beginnings |= {fed[:length] for length in range(1, len(fed) + 1)}
    assert sum(map(len, grow(requests, 10**6, ALWAYS_SHARE))) == len(beginnings)


def test_sharing_that_costs_more_than_it_saves_is_left() -> None:
    long, other = (0, *[1] * 60), (0, *[2] * 60)  # 1 token alike; together 121**2 pairs, apart 2 * 61**2
    requests = [Request(long, (3,)), Request(other, (3,))]
    more = 121**2 - 2 * 61**2
    assert [len(tree) for tree in grow(requests, 1000, more - 1)] == [61, 61]
    assert [len(tree) for tree in grow(requests, 1000, more + 1)] == [121]


def test_one_of_four_endings() -> None:
    requests = [Request((7, 8), (1, 2)), Request((7, 8), (1, 3)), Request((7, 8), (4, 5, 6))]
    (tree,) = grow(requests, 100, ALWAYS_SHARE)
    assert list(tree.tokens) == [7, 8, 1, 4, 5]
    assert list(tree.depths) == [0, 1, 2, 2, 3]
    assert list(tree.ends) == [5, 5, 3, 5, 5]
    assert not tree.is_chain
    assert {place.request: list(place.nodes) for place in tree.places} == {0: [1, 2], 1: [1, 2], 2: [1, 3, 4]}


def test_repeated_requests_cost_nothing() -> None:
    requests = [Request(tuple(range(50)), (1,))] * 3 + [Request(tuple(range(50)), (2,))]
    (tree,) = grow(requests, 10, 0.0)  # larger than the limit, but it is one sequence
    assert np.array_equal(tree.tokens, range(50))
    assert len(tree.places) == 4
