"""Where a vocabulary lets text be cut so that the parts, encoded on their own, give the ids of the whole.

A byte-pair merge joins a left piece, which ends with some character, and a right piece, which begins with the
one after it. Between two characters that no merge joins in that way nothing is ever joined.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from mobilellm.sentencepiece_model import BYTE_PIECES, SPACE
from mobilellm.tokenizer import Tokenizer

_BITS = 18
_FACTORS = (np.uint64(0x9E3779B97F4A7C15), np.uint64(0xC2B2AE3D27D4EB4F))
_MASKS = np.array([0, 0xFF, 0xFFFF, 0xFFFFFF, 0xFFFFFFFF], dtype=np.uint32)
_CONTINUES = 0x80  # of the upper two bits: a byte that is not the first of its character


class Cuts:
    """Read from the merges of a tokenizer. Text is UTF-8 with " " for ▁, and four bytes of padding.

    A table of pairs of bytes (the last of a character, the first of the next) settles most places. Where it
    forbids a cut beside a character beyond ASCII, whole characters are looked up: by a hash, which may forbid
    a cut too many, but never allows a wrong one. A vocabulary that merges byte pieces, which are not spelled
    as what they stand for, lets no text be cut.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        bytes_ = frozenset(BYTE_PIECES)
        self.anywhere = not any(left in bytes_ or right in bytes_ for left, right in tokenizer.merges)
        self._joined_bytes = np.zeros((256, 256), dtype=np.bool_)
        self._joined_bytes[:, 0x80:0xC0] = True  # inside a character
        pairs = {(left[-1], right[0]) for left, right in tokenizer.merges}
        keys = np.zeros((2, len(pairs)), dtype=np.uint32)
        for number, pair in enumerate(pairs):
            first, second = (character.replace(SPACE, " ").encode() for character in pair)
            self._joined_bytes[first[-1], second[0]] = True
            keys[:, number] = [int.from_bytes(code, "little") for code in (first, second)]
        self._joined = np.zeros(2**_BITS, dtype=np.bool_)
        self._joined[_pair_hashes(keys[0], keys[1])] = True
        self._allowed_bytes = ~self._joined_bytes.ravel()
        leads = np.arange(256)
        self._sizes = 1 + (leads >= 0xC0).astype(np.intp) + (leads >= 0xE0) + (leads >= 0xF0)

    def begins(self, padded: bytes, start: int, end: int) -> NDArray[np.bool_]:
        """For each byte from `start` to `end`, whether a part may begin there; at `start` one does."""
        codes = np.frombuffer(padded, dtype=np.uint8, count=end - start, offset=start)
        found = np.zeros(len(codes), dtype=np.bool_)
        found[0] = True
        if not self.anywhere:
            return found
        pairs = codes[:-1].astype(np.uint16)
        pairs <<= 8
        pairs |= codes[1:]
        np.take(self._allowed_bytes, pairs, out=found[1:])
        beyond_ascii = (codes[:-1] | codes[1:]) >= 0x80
        unsettled = np.flatnonzero(~found[1:] & beyond_ascii & (codes[1:] & 0xC0 != _CONTINUES)) + 1
        if len(unsettled):
            before = unsettled - 1
            for _ in range(3):  # to the first byte of that character
                before -= (codes[before] & 0xC0) == _CONTINUES
            first, second = (self._keys(padded, start, codes, places) for places in (before, unsettled))
            found[unsettled] = ~self._joined[_pair_hashes(first, second)]
        return found

    def _keys(
        self, padded: bytes, start: int, codes: NDArray[np.uint8], places: NDArray[np.intp]
    ) -> NDArray[np.uint32]:
        """The bytes of the characters that begin at `places`, each as one number."""
        anywhere = np.ndarray((len(padded) - start - 3,), "<u4", padded, offset=start, strides=(1,))
        keys: NDArray[np.uint32] = anywhere[places] & _MASKS[self._sizes[codes[places]]]
        return keys


def _pair_hashes(first: NDArray[np.uint32], second: NDArray[np.uint32]) -> NDArray[np.intp]:
    mixed = first.astype(np.uint64) * _FACTORS[0] + second.astype(np.uint64) * _FACTORS[1]
    mixed = (mixed ^ (mixed >> np.uint64(32))) * _FACTORS[0]
    hashes: NDArray[np.intp] = (mixed >> np.uint64(64 - _BITS)).astype(np.intp)
    return hashes
