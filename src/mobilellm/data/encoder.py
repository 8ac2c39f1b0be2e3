"""Text to the bytes of its token ids, word by word from a cache: the ids of `Tokenizer.encode`, much faster.

Byte-pair merges never reach over a place that no merge joins. In a vocabulary in which a space stands only
at the front of a piece, and a line break in no merged piece, text can be cut before each run of spaces and
around each line break, and the parts encoded on their own: the ids are the same. Whether a vocabulary is such
is read from its merges; one that is not is encoded whole. Natural text repeats its words, so most parts are
found in a dictionary.
"""

from __future__ import annotations

import re
from collections.abc import Callable

import numpy as np
import tokenizers

from mobilellm.data.shard_index import dtype_of
from mobilellm.sentencepiece_model import SPACE
from mobilellm.tokenizer import Tokenizer
from mobilellm.tokenizer_files import backend

_CACHED_WORDS = 150_000
"""Words each of the two generations of a cache holds: about 30 MB."""
_LONGEST_CACHED = 48
"""Characters; longer words seldom come again."""

_BREAK = "\n"
_BREAK_BYTE = "<0x0A>"
_runs = re.compile(" +[^ ]*|[^ ]+").findall


class Encoder:
    """Encodes documents for shards with one tokenizer. `dtype` is the number type of the ids' bytes."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.dtype = np.dtype(dtype_of(tokenizer.vocab_size))
        self._model = backend(tokenizer.pieces, tokenizer.merges).model  # no normaliser: that is done here
        self._long = tokenizers.Tokenizer(self._model)
        cuts_spaces, cuts_breaks = cuts(tokenizer)
        self._encode = (
            self._by_lines
            if cuts_spaces and cuts_breaks
            else self._by_spaces
            if cuts_spaces
            else self._at_once
        )
        self._spaced = _Words(lambda word: self._ids(SPACE + word))
        self._bare = _Words(lambda word: self._ids(word.replace(" ", SPACE)))
        self._break = self._ids(_BREAK)

    def encode(self, text: str) -> bytes:
        """The ids of `tokenizer.encode(text, bos=False)`. Raises ValueError for lone surrogates."""
        if not text:
            return b""  # the tokenizer puts its space in front of something only
        try:
            return self._encode(text.replace(SPACE, " ") if SPACE in text else text)
        except TypeError:
            text.encode()  # UnicodeEncodeError, which is a ValueError
            raise

    def _by_lines(self, text: str) -> bytes:
        parts: list[bytes] = []
        first, *lines = text.split(_BREAK)
        self._add(parts, " " + first)  # the tokenizer puts a space in front of every text
        for line in lines:
            parts.append(self._break)
            self._add(parts, line)
        return b"".join(parts)

    def _by_spaces(self, text: str) -> bytes:
        parts: list[bytes] = []
        self._add(parts, " " + text)
        return b"".join(parts)

    def _at_once(self, text: str) -> bytes:
        return self._ids(SPACE + text.replace(" ", SPACE))

    def _add(self, parts: list[bytes], line: str) -> None:
        if "  " in line:  # a run of spaces goes with the word after it
            parts.extend(map(self._bare.__getitem__, _runs(line)))
        elif line:
            first, *words = line.split(" ")
            parts.append(self._bare[first])
            parts.extend(map(self._spaced.__getitem__, words))

    def _ids(self, text: str) -> bytes:
        """Ids of text in which spaces are replaced."""
        if len(text) <= _LONGEST_CACHED:  # quicker for words, slower for more
            return np.array([token.id for token in self._model.tokenize(text)], dtype=self.dtype).tobytes()
        encoding = self._long.encode_batch_fast([text], add_special_tokens=False)[0]
        return np.array(encoding.ids, dtype=self.dtype).tobytes()


class _Words(dict[str, bytes]):
    """Ids by word, made when first asked for. Of two generations the older goes when the newer is full."""

    def __init__(self, make: Callable[[str], bytes]) -> None:
        super().__init__()
        self._make, self._older = make, dict[str, bytes]()

    def __missing__(self, word: str) -> bytes:
        found = self._older.get(word)
        if found is None:
            found = self._make(word)
            if len(word) > _LONGEST_CACHED:
                return found
        if len(self) >= _CACHED_WORDS:
            self._older = dict(self)
            self.clear()
        self[word] = found
        return found


def cuts(tokenizer: Tokenizer) -> tuple[bool, bool]:
    """Whether text may be cut before a run of spaces, and on both sides of a line break."""
    spaces = all(not right.startswith(SPACE) or left.endswith(SPACE) for left, right in tokenizer.merges)
    breaks = all(
        not left.endswith((_BREAK, _BREAK_BYTE)) and not right.startswith((_BREAK, _BREAK_BYTE))
        for left, right in tokenizer.merges
    )
    return spaces, breaks
