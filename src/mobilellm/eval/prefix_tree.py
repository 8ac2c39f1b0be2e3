"""Requests that begin alike, laid out so that what they share is computed once.

The sequences a model has to be fed (each request's context and continuation, less the last token, which
predicts nothing that is asked) are put in order, so that those that begin alike are neighbours, and merged
into trees. A tree is one row of tokens, every branch written out before the next: the descendants of the node
at i are the nodes i + 1 … ends[i] - 1. A node's position is its depth, and it may look at itself and its
ancestors: at j if j <= i < ends[j].
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from mobilellm.eval.interface import Request

Whole = NDArray[np.int64]


class Place(NamedTuple):
    """Where a request is answered: `nodes[k]` predicts the token k of its continuation."""

    request: int
    nodes: Whole


class PrefixTree(NamedTuple):
    """T nodes."""

    tokens: Whole  # (T,)
    depths: Whole  # (T,)
    ends: Whole  # (T,)
    places: tuple[Place, ...]

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def is_chain(self) -> bool:
        """Whether no node has two children, so that plain causal attention does."""
        return bool(self.depths[-1] == len(self.tokens) - 1)


def grow(requests: Sequence[Request], most: int, pairs_a_token: float) -> Iterator[PrefixTree]:
    """Trees that together answer every request once.

    Requests share a tree where that costs less: a token computed is worth `pairs_a_token` (query, key) pairs
    of attention, and attention takes the square of a tree's size. A tree of several requests has at most
    `most` nodes.
    """
    fed = [(*context, *continuation[:-1]) for context, continuation in requests]
    order = sorted(range(len(fed)), key=fed.__getitem__)
    tree, before = _Tree(), tuple[int, ...]()
    for number in order:
        sequence = fed[number]
        shared = _length_shared(before, sequence)
        size, new = len(tree.tokens), len(sequence) - shared
        more_pairs = (size + new) ** 2 - size**2 - len(sequence) ** 2
        if size and new and (size + new > most or shared * pairs_a_token <= more_pairs):
            yield tree.finished()
            tree, shared = _Tree(), 0
        tree.add(number, sequence, shared, len(requests[number].continuation))
        before = sequence
    if tree.tokens:
        yield tree.finished()


class _Tree:
    """A tree in the making. `path` are the nodes of the sequence added last."""

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.depths: list[int] = []
        self.ends: list[int] = []
        self.path: list[int] = []
        self.places: list[Place] = []

    def add(self, request: int, sequence: tuple[int, ...], shared: int, predicted: int) -> None:
        """Add a sequence whose first `shared` tokens are those of the sequence added last."""
        self._close(shared)
        size, new = len(self.tokens), len(sequence) - shared
        self.path += range(size, size + new)
        self.tokens += sequence[shared:]
        self.depths += range(shared, len(sequence))
        self.ends += [0] * new
        self.places.append(Place(request, np.array(self.path[len(sequence) - predicted :], dtype=np.int64)))

    def _close(self, depth: int) -> None:
        """No node of the path from `depth` on gets another descendant."""
        for node in self.path[depth:]:
            self.ends[node] = len(self.tokens)
        del self.path[depth:]

    def finished(self) -> PrefixTree:
        self._close(0)
        tokens, depths, ends = (
            np.array(part, dtype=np.int64) for part in (self.tokens, self.depths, self.ends)
        )
        return PrefixTree(tokens, depths, ends, tuple(self.places))


def _length_shared(a: tuple[int, ...], b: tuple[int, ...]) -> int:
    """How many tokens two sequences have in common at their beginnings."""
    length = min(len(a), len(b))
    if a[:length] == b[:length]:
        return length
    return next(i for i in range(length) if a[i] != b[i])
