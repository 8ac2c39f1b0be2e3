"""Near duplicates by MinHash: texts with many five-word runs in common share a band of their signatures.

The signatures are datasketch's. Bands and rows are chosen for a threshold as its MinHashLSH does; which bands
were seen is kept in a `DigestSet`, 8 bytes a band, because an index of datasketch holds kilobytes a text.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

PERMUTATIONS = 128
_RUN = 5
_AT_ONCE = 4096
_SEED = 1
_MULTIPLIER = 0x9E3779B97F4A7C15


class Bands(NamedTuple):
    """Two texts of Jaccard similarity s share one of the bands with probability 1 - (1 - s**rows)**bands."""

    bands: int
    rows: int  # values in a band


def bands_for(threshold: float) -> Bands:
    """The bands that tell similarities above `threshold` (Jaccard) best from those below."""
    from datasketch import MinHashLSH

    if not 0 < threshold < 1:
        raise ValueError(f"near duplicates: threshold = {threshold} must lie between 0 and 1")
    index = MinHashLSH(threshold=threshold, num_perm=PERMUTATIONS)
    return Bands(index.b, index.r)


class Signer:
    """Makes the band digests of texts. The same text gives the same ones everywhere."""

    def __init__(self, bands: Bands) -> None:
        self._bands = bands
        self._numbers: dict[str, int] = {}

    def digests_of_all(self, texts: Sequence[str]) -> NDArray[np.uint64]:
        """The digests of each text, (texts, bands)."""
        found = np.empty((len(texts), self._bands.bands), dtype=np.uint64)
        for row, text in enumerate(texts):
            found[row] = self.digests(text)
        return found

    def digests(self, text: str) -> NDArray[np.uint64]:
        """One 64-bit number a band. A text of fewer than five words counts as one run."""
        from datasketch import MinHash

        signature = MinHash(
            PERMUTATIONS, seed=_SEED, hashfunc=int, permutations=self._permutations, scheme="affine32"
        )
        runs = self._runs(text.split())
        for start in range(0, len(runs), _AT_ONCE):
            signature.update_batch(runs[start : start + _AT_ONCE].tolist())
        values = signature.hashvalues[: self._bands.bands * self._bands.rows]
        return _mixed(values.reshape(self._bands.bands, self._bands.rows).astype(np.uint64))

    @cached_property
    def _permutations(self) -> Any:
        from datasketch import MinHash

        return MinHash(PERMUTATIONS, seed=_SEED, scheme="affine32").permutations

    def _runs(self, words: list[str]) -> NDArray[np.uint64]:
        """32-bit hashes of all runs of five words, each once."""
        known = self._numbers
        if len(known) > 200_000:
            known.clear()
        for word in set(words):
            if word not in known:
                known[word] = _word_hash(word)
        numbers = np.array([known[word] for word in words], dtype=np.uint64)
        count = max(1, len(numbers) - _RUN + 1)
        total = np.zeros(count, dtype=np.uint64)
        for i in range(min(_RUN, len(numbers))):
            total += numbers[i : i + count] * np.uint64(pow(_MULTIPLIER, i + 1, 2**64))
        total ^= total >> np.uint64(32)
        return np.unique(total & np.uint64(0xFFFFFFFF))


def _word_hash(word: str) -> int:
    return int.from_bytes(hashlib.blake2b(word.encode(), digest_size=8).digest(), "little")


def _mixed(rows: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """One number for each row, which tells bands apart too."""
    total = np.arange(1, len(rows) + 1, dtype=np.uint64) * np.uint64(_MULTIPLIER)
    for column in rows.T:
        total = (total ^ column) * np.uint64(0xFF51AFD7ED558CCD)
        total ^= total >> np.uint64(32)
    return total
