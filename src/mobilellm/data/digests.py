"""A set of 64-bit digests in 12 to 24 bytes each: what remembers all documents of a large corpus."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Digests = NDArray[np.uint64]

_SMALLEST = 2**12
_FREE = np.uint64(0)
_SPREAD = np.uint64(0x9E3779B97F4A7C15)  # 2**64 over the golden ratio: neighbours end up far apart


class DigestSet:
    """A hash table in one array (open addressing, linear probing), filled many digests at a time.

    Among a billion documents with good hashes two different ones share 64 bits with a chance of 3 %.
    """

    def __init__(self) -> None:
        self._slots: Digests = np.zeros(_SMALLEST, dtype=np.uint64)
        self._count = 0

    def __len__(self) -> int:
        return self._count

    @property
    def bytes(self) -> int:
        """Memory it takes."""
        return self._slots.nbytes

    def add(self, digests: Digests) -> NDArray[np.bool_]:
        """Add all; for each, whether it was new. Of equal ones in `digests` the first counts as new."""
        new = np.zeros(len(digests), dtype=np.bool_)
        unique, first = np.unique(digests, return_index=True)
        unique[unique == _FREE] = 1  # which stands for both
        while 3 * (self._count + len(unique)) > 2 * len(self._slots):
            self._grow()
        new[first] = self._insert(unique)
        return new

    def _insert(self, digests: Digests) -> NDArray[np.bool_]:
        """Whether each of these, which differ, was new. Those that meet another in their slot move on."""
        slots, mask = self._slots, np.uint64(len(self._slots) - 1)
        shift = np.uint64(65 - len(slots).bit_length())
        new = np.zeros(len(digests), dtype=np.bool_)
        waiting: NDArray[Any] = np.arange(len(digests))
        places = (digests * _SPREAD) >> shift
        while len(waiting):
            wanted, at = digests[waiting], places[waiting]
            free = slots[at] == _FREE
            slots[at[free]] = wanted[free]  # several may claim a slot; the last one has it
            settled = slots[at] == wanted
            new[waiting[settled & free]] = True
            waiting = waiting[~settled]
            places[waiting] = (places[waiting] + np.uint64(1)) & mask
        self._count += int(new.sum())
        return new

    def _grow(self) -> None:
        before = self._slots[self._slots != _FREE]
        self._slots = np.zeros(2 * len(self._slots), dtype=np.uint64)
        self._count = 0
        self._insert(before)
