"""A table from words to their token ids that is asked for all words of a text at once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

_SLOTS = 2**20
_MOST_WORDS = 600_000
"""Then it is emptied. A hundred megabytes of English prose have about 115,000."""
_MOST_LONG_WORDS = 50_000
_LONGEST_KEPT = 64
"""Bytes; longer words seldom come again."""
_KEY = 8
_LONGEST_KEY = 2 * _KEY

_MASKS = np.array([2 ** (8 * size) - 1 for size in range(_KEY + 1)], dtype=np.uint64)
_FACTORS = [np.uint64(i) for i in (0x9E3779B97F4A7C15, 0xC2B2AE3D27D4EB4F, 0x165667B19E3779F9)]

Integers = NDArray[np.int64]


class WordTable:
    """Ids by word, made with `encode` when first asked for.

    A hash table with open addressing over arrays: 23 MB, and two or four bytes for each id.
    """

    def __init__(self, encode: Callable[[Sequence[bytes]], list[list[int]]], dtype: np.dtype[Any]) -> None:
        self._encode, self._dtype = encode, dtype
        self._count, self._used = 0, 0
        self._pool: NDArray[Any] = np.empty(0, dtype=dtype)
        self._clear()

    def look_up(self, padded: bytes, borders: Integers) -> tuple[NDArray[Any], Integers]:
        """Ids of the words between neighbouring borders, one after the other, and how many each word has.

        `padded` has 16 bytes more than the last border.
        """
        if self._count > _MOST_WORDS or len(self._long) > _MOST_LONG_WORDS:
            self._clear()
        starts, lengths = borders[:-1], np.diff(borders)
        low, high = _keys(padded, starts, lengths)
        slots = self._find(low, high, lengths)
        missing = np.flatnonzero(slots < 0)
        first, counts = self._first[slots].astype(np.int64), self._counts[slots].astype(np.int64)
        if len(missing):
            first[missing], counts[missing] = self._new(padded, starts, lengths, low, high, missing)
        ends = np.cumsum(counts)
        places = np.arange(ends[-1]) + np.repeat(first - (ends - counts), counts)
        return self._pool[places], counts

    def _new(
        self,
        padded: bytes,
        starts: Integers,
        lengths: Integers,
        low: NDArray[np.uint64],
        high: NDArray[np.uint64],
        missing: Integers,
    ) -> tuple[Integers, Integers]:
        """Encode the words that are not in the table, each once, and put the shorter ones into it."""
        begins, sizes = starts[missing], lengths[missing]
        spans = zip(begins.tolist(), (begins + sizes).tolist(), strict=True)
        words = [padded[start:end] for start, end in spans]
        different = dict.fromkeys(words)
        known = {word: self._long[word] for word in different if word in self._long}
        new = [word for word in different if word not in known]
        new.sort(key=lambda word: len(word) > _LONGEST_KEPT)  # those that are not kept come last
        kept = sum(len(word) <= _LONGEST_KEPT for word in new)
        encoded = self._encode(new[:kept]) + self._encode(new[kept:])
        begin = place = self._used
        for word, ids in zip(new, encoded, strict=True):
            known[word] = (place, len(ids))
            place += len(ids)
            if len(word) <= _LONGEST_KEPT:
                self._used = place
                if len(word) > _LONGEST_KEY:
                    self._long[word] = known[word]
        if place > len(self._pool):
            self._pool = np.concatenate([self._pool, np.empty(place, dtype=self._dtype)])
        self._pool[begin:place] = [i for ids in encoded for i in ids]
        found = np.array([known[word] for word in words], dtype=np.int64)
        short = sizes <= _LONGEST_KEY
        chosen = missing[short]
        self._insert(low[chosen], high[chosen], lengths[chosen], found[short])
        return found[:, 0], found[:, 1]

    def _find(self, low: NDArray[np.uint64], high: NDArray[np.uint64], lengths: Integers) -> Integers:
        """The slot of each word, -1 where it is not in the table (longer ones never are)."""
        slots = _hashes(low, high, lengths)
        found = self._is(slots, low, high, lengths)
        pending = np.flatnonzero(~found & (self._lengths[slots] != 0) & (lengths <= _LONGEST_KEY))
        slots[~found] = -1
        at = _hashes(low[pending], high[pending], lengths[pending])
        while len(pending):
            at = (at + 1) % _SLOTS
            found = self._is(at, low[pending], high[pending], lengths[pending])
            slots[pending[found]] = at[found]
            further = ~found & (self._lengths[at] != 0)
            pending, at = pending[further], at[further]
        return slots

    def _is(
        self, slots: Integers, low: NDArray[np.uint64], high: NDArray[np.uint64], lengths: Integers
    ) -> NDArray[np.bool_]:
        same: NDArray[np.bool_] = (
            (self._low[slots] == low) & (self._high[slots] == high) & (self._lengths[slots] == lengths)
        )
        return same

    def _insert(
        self, low: NDArray[np.uint64], high: NDArray[np.uint64], lengths: Integers, found: Integers
    ) -> None:
        """Give each word a free slot; the same word may come several times."""
        waiting = np.arange(len(low))
        at = _hashes(low, high, lengths)
        while len(waiting):
            free = self._lengths[at] == 0
            claimed, first = np.unique(at[free], return_index=True)  # of several claims one holds
            by = waiting[free][first]
            self._low[claimed], self._high[claimed], self._lengths[claimed] = low[by], high[by], lengths[by]
            self._first[claimed], self._counts[claimed] = found[by, 0], found[by, 1]
            self._count += len(claimed)
            settled = self._is(at, low[waiting], high[waiting], lengths[waiting])
            waiting, at = waiting[~settled], (at[~settled] + 1) % _SLOTS

    def _clear(self) -> None:
        self._count = self._used = 0
        self._low = np.zeros(_SLOTS, dtype=np.uint64)
        self._high = np.zeros(_SLOTS, dtype=np.uint64)
        self._lengths = np.zeros(_SLOTS, dtype=np.uint8)
        self._first = np.zeros(_SLOTS, dtype=np.int32)
        self._counts = np.zeros(_SLOTS, dtype=np.uint8)
        self._pool = np.empty(2**16, dtype=self._dtype)
        self._long: dict[bytes, tuple[int, int]] = {}


def _keys(
    padded: bytes, starts: Integers, lengths: Integers
) -> tuple[NDArray[np.uint64], NDArray[np.uint64]]:
    """The first and the second eight bytes of each word, zeros after its end."""
    anywhere = np.ndarray((len(padded) - _KEY + 1,), dtype="<u8", buffer=padded, strides=(1,))
    low = anywhere[starts] & _MASKS[np.minimum(lengths, _KEY)]
    high = anywhere[starts + _KEY] & _MASKS[np.clip(lengths - _KEY, 0, _KEY)]
    return low, high


def _hashes(low: NDArray[np.uint64], high: NDArray[np.uint64], lengths: Integers) -> Integers:
    """The slot where looking for a word begins."""
    mixed = low * _FACTORS[0] + high * _FACTORS[1] + lengths.astype(np.uint64) * _FACTORS[2]
    mixed = (mixed ^ (mixed >> np.uint64(32))) * _FACTORS[0]
    slots: Integers = (mixed >> np.uint64(65 - _SLOTS.bit_length())).astype(np.int64)
    return slots
