"""Documents to token ids, word by word out of a table: the ids of `Tokenizer.encode`, many times faster.

Text is cut where the vocabulary lets it be cut without changing an id (`cuts.py`): in the usual ones between
a word and the space after it, around punctuation, digits and line breaks.

Natural text repeats its parts ("words" below), so nearly all are found in a table. numpy looks up those of a
whole segment of text at once (`words.py`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import tokenizers
from numpy.typing import NDArray

from mobilellm.data.cuts import Cuts
from mobilellm.data.shard_index import dtype_of
from mobilellm.data.words import WordTable
from mobilellm.sentencepiece_model import SPACE
from mobilellm.tokenizer import BOS_ID, EOS_ID, Tokenizer
from mobilellm.tokenizer_files import backend

_SEGMENT = 2**18
"""Bytes looked up at a time; the numbers about its words stay in a processor's cache."""

_SHORT = 100

_SPACE_BYTES = SPACE.encode()


class Encoded(NamedTuple):
    """The ids of all documents one after the other, BOS and EOS included, and how many each has."""

    ids: NDArray[Any]
    tokens: NDArray[np.int64]


class Encoder:
    """Encodes documents for shards with one tokenizer."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.dtype = np.dtype(dtype_of(tokenizer.vocab_size))
        self._model = backend(tokenizer.pieces, tokenizer.merges).model  # without the normaliser
        self._backend = tokenizers.Tokenizer(self._model)
        self._cuts = Cuts(tokenizer)
        self._words = WordTable(self._encode_words, self.dtype)

    def encode(self, texts: Sequence[bytes]) -> Encoded:
        """As `tokenizer.encode(text, eos=True)` for each text, which is given in UTF-8."""
        parts = [self._normalised(text) for text in texts]
        return _framed(*self._by_words(parts))

    @staticmethod
    def _normalised(text: bytes) -> bytes:
        """With the space that the tokenizer puts in front; ▁ and the space are one character to it."""
        return b" " + text.replace(_SPACE_BYTES, b" ") if text else b""

    def _encode_words(self, words: Sequence[bytes]) -> list[list[int]]:
        texts = [word.decode().replace(" ", SPACE) for word in words]
        if all(len(text) <= _SHORT for text in texts):  # quicker one by one
            return [[token.id for token in self._model.tokenize(text)] for text in texts]
        return [found.ids for found in self._backend.encode_batch_fast(texts, add_special_tokens=False)]

    def _by_words(self, parts: Sequence[bytes]) -> tuple[NDArray[Any], NDArray[np.int64]]:
        text = b"".join(parts)
        offsets = np.cumsum([0, *map(len, parts)])
        padded = text + bytes(16)  # keys are read 16 bytes at a time
        tokens = np.zeros(len(parts), dtype=np.int64)
        found: list[NDArray[Any]] = []
        start, size = 0, _SEGMENT
        while start < len(text):
            starts, end = self._cut(padded, offsets, start, min(start + size, len(text)), len(text))
            if end == start:  # one word is longer than that
                size *= 2
                continue
            ids, counts = self._words.look_up(padded, np.append(starts, end))
            found.append(ids)
            first, last = np.searchsorted(offsets, [start, end], side="right") - 1
            inner = np.clip(offsets[first : last + 2], start, end)
            before = np.concatenate([[0], np.cumsum(counts)])[np.searchsorted(starts, inner)]
            tokens[first : first + len(before) - 1] += np.diff(before)
            start, size = end, _SEGMENT
        return np.concatenate(found) if found else np.empty(0, self.dtype), tokens

    def _cut(
        self, padded: bytes, offsets: NDArray[np.int64], start: int, end: int, length: int
    ) -> tuple[NDArray[np.int64], int]:
        """Where words begin in [start, end), and where the last whole one ends."""
        begins = self._cuts.begins(padded, start, end)
        first, last = np.searchsorted(offsets, [start, end])
        begins[offsets[first:last] - start] = True
        starts = np.flatnonzero(begins) + start
        if end == length:
            return starts, end
        return starts[:-1], int(starts[-1])


def _framed(ids: NDArray[Any], tokens: NDArray[np.int64]) -> Encoded:
    """With BOS before and EOS after each document."""
    ends = np.cumsum(tokens + 2)
    result = np.empty(len(ids) + 2 * len(tokens), dtype=ids.dtype)
    inner = np.ones(len(result), dtype=np.bool_)
    first, last = ends - tokens - 2, ends - 1
    inner[first] = inner[last] = False
    result[first], result[last], result[inner] = BOS_ID, EOS_ID, ids
    return Encoded(result, tokens + 2)
