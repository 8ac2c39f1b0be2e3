"""Token shards: flat little-endian uint16/uint32 files that are memory-mapped, and one index.json.

Every document is stored as BOS, its tokens, EOS, whole in one file; a split is its files one after the other.
"""

from __future__ import annotations

import hashlib
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any, overload

import numpy as np
from numpy.typing import DTypeLike, NDArray

from mobilellm.atomic import atomic_directory, check_destination
from mobilellm.data.documents import Document
from mobilellm.data.shard_index import (
    DTYPES,
    FORMAT,
    SPLITS,
    Shard,
    ShardError,
    ShardIndex,
    make_index,
    read_index,
    write_index,
)
from mobilellm.data.shard_writer import SHARD_TOKENS, ShardWriter
from mobilellm.tokenizer import Tokenizer

__all__ = [
    "DTYPES", "FORMAT", "SHARD_TOKENS", "SPLITS", "Shard", "ShardError", "ShardIndex", "ShardWriter", "Split",
    "make_index", "read_index", "read_split", "verify", "write_index", "write_shards",
]  # fmt: skip

_OPEN_FILES = 128
"""Memory maps a split keeps: each holds a file descriptor, and a trillion tokens are 10,000 files."""


class Split:
    """The tokens of one split, read-only, over all its memory-mapped files and never in memory as a whole.

    `split[a:b]` is a numpy array: a view of the file, or a copy where it reaches over the border of two.
    `split[i]` is an int, `np.asarray(split)` all of it. Pickles; the other process maps the files anew.
    """

    def __init__(self, directory: Path, shards: Sequence[Shard], dtype: str) -> None:
        self.shards = tuple(shards)
        self.dtype: np.dtype[Any] = np.dtype(dtype)
        self._directory = directory
        self._ends = list(accumulate(shard.tokens for shard in shards))
        self._maps: OrderedDict[int, NDArray[np.integer[Any]]] = OrderedDict()

    @property
    def tokens(self) -> int:
        return self._ends[-1]

    @property
    def documents(self) -> int:
        return sum(shard.documents for shard in self.shards)

    @property
    def bytes(self) -> int:
        """UTF-8 bytes of the text."""
        return sum(shard.bytes for shard in self.shards)

    @property
    def words(self) -> int:
        return sum(shard.words for shard in self.shards)

    @property
    def fingerprint(self) -> str:
        """SHA-256 over the order, number type and sha256 of the files: equal means the same tokens.

        The same tokens cut into other files give another one.
        """
        content = " ".join([self.dtype.str, *(shard.sha256 for shard in self.shards)])
        return hashlib.sha256(content.encode()).hexdigest()

    def __len__(self) -> int:
        return self.tokens

    @overload
    def __getitem__(self, index: int) -> int: ...

    @overload
    def __getitem__(self, index: slice) -> NDArray[np.integer[Any]]: ...

    def __getitem__(self, index: int | slice) -> int | NDArray[np.integer[Any]]:
        if not isinstance(index, slice):
            position = range(self.tokens)[index]  # from the end if negative; IndexError
            return int(self._between(position, position + 1)[0])
        positions = range(*index.indices(self.tokens))
        if not positions:
            return np.empty(0, dtype=self.dtype)
        low, high = min(positions[0], positions[-1]), max(positions[0], positions[-1])
        found = self._between(low, high + 1)
        return found if positions.step == 1 else found[:: positions.step]

    def __array__(self, dtype: DTypeLike | None = None, copy: bool | None = None) -> NDArray[Any]:
        array: NDArray[Any] = self[:]
        return array.astype(dtype or array.dtype, copy=bool(copy))

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_maps": OrderedDict()}

    def _between(self, start: int, stop: int) -> NDArray[np.integer[Any]]:
        """Tokens [start, stop), of which there is at least one."""
        parts = []
        number = bisect_right(self._ends, start)
        while start < stop:
            first = self._ends[number] - self.shards[number].tokens
            end = min(stop, self._ends[number])
            parts.append(self._file(number)[start - first : end - first])
            start, number = end, number + 1
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def _file(self, number: int) -> NDArray[np.integer[Any]]:
        found = self._maps.get(number)
        if found is None:
            file, tokens = self._directory / self.shards[number].file, self.shards[number].tokens
            try:
                found = np.memmap(file, dtype=self.dtype, mode="r", shape=(tokens,)).view(np.ndarray)
            except ValueError:  # shortened since the split was opened
                raise ShardError(f"{file}: not {tokens} tokens long; prepare the data again") from None
            self._maps[number] = found
            if len(self._maps) > _OPEN_FILES:
                self._maps.popitem(last=False)
        self._maps.move_to_end(number)
        return found


def read_split(directory: Path, split: str, tokenizer: Tokenizer | None = None) -> Split:
    """All tokens of a split. With a tokenizer, its fingerprint must be the one the shards were made with.

    Raises ShardError for missing or shortened files and another tokenizer. `verify` compares the bytes.
    """
    index = read_index(directory)
    if tokenizer is not None and tokenizer.fingerprint != index.tokenizer:
        raise ShardError(
            f"{directory}: made with tokenizer {index.tokenizer[:12]}…, not with this one "
            f"({tokenizer.fingerprint[:12]}…); prepare the data again with it"
        )
    shards = [shard for shard in index.shards if shard.split == split]
    if not shards:
        splits = sorted({shard.split for shard in index.shards})
        raise ShardError(f"{directory}: has no split {split!r}; it has {', '.join(splits)}")
    for shard in shards:
        file = directory / shard.file
        if not file.is_file() or file.stat().st_size != shard.tokens * np.dtype(index.dtype).itemsize:
            raise ShardError(f"{file}: missing or not {shard.tokens} tokens long; prepare the data again")
    return Split(directory, shards, index.dtype)


def verify(directory: Path) -> None:
    """Compare every file with its sha256. Raises ShardError."""
    for shard in read_index(directory).shards:
        file = directory / shard.file
        if not file.is_file() or file_sha256(file) != shard.sha256:
            raise ShardError(f"{file}: its bytes are not those that were written; prepare the data again")


def write_shards(
    directory: Path,
    documents: Iterable[Document],
    tokenizer: Tokenizer,
    source: str,
    licence: str,
    held_out: float = 0.05,
    overwrite: bool = False,
) -> ShardIndex:
    """Tokenise documents into `directory`, tokenizer and all, whole or not at all.

    For texts that fit in memory; `mobilellm.data.prepare` takes any amount. A document is held out by the
    hash of its text, so the split does not depend on order, and a text never stands on both sides. Of two or
    more texts each side has at least one, however small `held_out` is. Raises ShardError if nothing is left.
    """
    if not 0 < held_out < 1:
        raise ValueError(f"held_out = {held_out} must lie between 0 and 1; it is a share of the documents")
    check_destination(directory, overwrite)  # before the work, not after it
    chosen, rejected = _distinct(documents)
    if len(chosen) < 2:
        raise ShardError(
            f"{source}: {len(chosen)} different documents with text ({_counts(rejected)}); at least 2 are "
            "needed, one to train on and one to hold out; give more text"
        )
    sides = _split(chosen, held_out)
    with atomic_directory(directory, overwrite) as temporary:
        with ShardWriter(temporary, tokenizer.vocab_size) as writer:
            for split, side in sides.items():
                _tokenise(writer, split, side, tokenizer)
            shards = writer.finish()
        index = make_index(tokenizer.vocab_size, tokenizer.fingerprint, source, licence, rejected, shards)
        write_index(temporary, index)
        tokenizer.save(temporary / "tokenizer")
    return index


def _distinct(documents: Iterable[Document]) -> tuple[dict[bytes, Document], dict[str, int]]:
    """Documents by the sha256 of their text, in order, and how many were rejected for which reason."""
    chosen: dict[bytes, Document] = {}
    rejected = {"empty": 0, "duplicate": 0, "not Unicode": 0}
    for document in documents:
        try:
            digest = hashlib.sha256(document.text.encode()).digest()
        except UnicodeEncodeError:  # lone surrogates, as JSON can carry them
            rejected["not Unicode"] += 1
            continue
        if not document.text.strip():
            rejected["empty"] += 1
        elif digest in chosen:
            rejected["duplicate"] += 1
        else:
            chosen[digest] = document
    return chosen, rejected


def _split(chosen: dict[bytes, Document], held_out: float) -> dict[str, list[Document]]:
    """Hold out the texts whose hash lies below a bound; the lowest always, the highest never."""
    lowest, highest = min(chosen), max(chosen)
    sides: dict[str, list[Document]] = {split: [] for split in SPLITS}
    for digest, document in chosen.items():
        below = int.from_bytes(digest[:8], "big") < held_out * 2**64
        out = digest == lowest or (below and digest != highest)
        sides[SPLITS[out]].append(document)
    return sides


def _tokenise(writer: ShardWriter, split: str, documents: Sequence[Document], tokenizer: Tokenizer) -> None:
    for start in range(0, len(documents), 256):
        texts = [document.text for document in documents[start : start + 256]]
        for text, ids in zip(texts, tokenizer.encode_batch(texts, eos=True), strict=True):
            writer.add(split, ids, len(text.encode()), len(text.split()))


def _counts(rejected: dict[str, int]) -> str:
    return ", ".join(f"{count} {reason}" for reason, count in rejected.items())


def file_sha256(file: Path) -> str:
    """Of all bytes of a file, in hexadecimal."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
