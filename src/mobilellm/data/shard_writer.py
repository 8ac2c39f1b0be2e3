"""Writing token shards document by document: files roll over when full and are hashed while written."""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from mobilellm.atomic import sync
from mobilellm.data.shard_index import SPLITS, Shard, ShardError, dtype_of

SHARD_TOKENS = 100_000_000
"""Tokens after which a file is full: 200 MB of uint16."""

_NAME = re.compile(r"[a-z0-9][a-z0-9-]*")
_HASHED_AT_ONCE = 2**20


class ShardWriter:
    """Appends documents to the shard files of one folder; the caller writes the index last (`write_index`).

    A document is never cut: a file takes documents until it holds `shard_tokens` or more. The files depend
    on the documents and their order alone. After `sync()`, whose state fits in JSON, a new writer made with
    `resume` goes on as if nothing had happened, whatever was written after it. As a context manager it closes
    its files. Raises OSError naming the file when the disk is full.
    """

    def __init__(self, directory: Path, vocab_size: int, shard_tokens: int = SHARD_TOKENS) -> None:
        if shard_tokens < 1:
            raise ValueError(f"shard_tokens = {shard_tokens} must be at least 1")
        self.dtype: np.dtype[Any] = np.dtype(dtype_of(vocab_size))
        self._directory, self._vocab_size, self._shard_tokens = directory, vocab_size, shard_tokens
        self._full: list[Shard] = []
        self._open: dict[str, _File] = {}

    @classmethod
    def resume(
        cls, directory: Path, vocab_size: int, state: Mapping[str, Any], shard_tokens: int = SHARD_TOKENS
    ) -> ShardWriter:
        """Go on after `state`: open files are cut back to what they held then, later files removed.

        Raises ShardError if a file is shorter than it was.
        """
        writer = cls(directory, vocab_size, shard_tokens)
        writer._full = [Shard(**shard) for shard in state["full"]]
        for values in state["open"]:
            writer._open[values["split"]] = _File.reopened(directory, Shard(**values), writer.dtype.itemsize)
        known = {shard.file for shard in writer._full} | {file.path.name for file in writer._open.values()}
        for path in directory.glob("*.bin"):
            if path.name not in known:
                path.unlink()
        return writer

    def add(self, split: str, ids: Sequence[int] | NDArray[Any], num_bytes: int, num_words: int) -> None:
        """One document: its ids with BOS and EOS, the UTF-8 bytes and the words of its text."""
        lengths = np.array([len(ids)])
        self.add_many(split, np.asarray(ids), lengths, np.array([num_bytes]), np.array([num_words]))

    def add_many(
        self,
        split: str,
        ids: NDArray[Any],
        num_tokens: NDArray[Any],
        num_bytes: NDArray[Any],
        num_words: NDArray[Any],
    ) -> None:
        """As `add` for several documents, whose ids stand one after the other."""
        if len(num_tokens) == 0:
            return
        if num_tokens.min() < 1 or num_tokens.sum() != len(ids):
            raise ValueError(
                f"shards: {len(ids)} ids are not documents of {num_tokens.tolist()[:8]} … tokens"
            )
        if not 0 <= ids.min() <= ids.max() < self._vocab_size:
            raise ValueError(
                f"shards: token ids {ids.min()} … {ids.max()} do not lie in the vocabulary of "
                f"{self._vocab_size}"
            )
        data = np.ascontiguousarray(ids, dtype=self.dtype)
        ends = np.cumsum(num_tokens)
        first = 0
        while first < len(num_tokens):
            file = self._file(split)
            start = int(ends[first - 1]) if first else 0
            # the document that fills the file is its last
            full = int(np.searchsorted(ends, start + self._shard_tokens - file.tokens))
            last = min(full + 1, len(num_tokens))
            part = slice(first, last)
            file.append(
                data[start : int(ends[last - 1])],
                last - first,
                int(num_bytes[part].sum()),
                int(num_words[part].sum()),
            )
            if file.tokens >= self._shard_tokens:
                self._full.append(file.close())
                del self._open[split]
            first = last

    @property
    def tokens(self) -> int:
        """Tokens so far, over all splits."""
        return sum(shard.tokens for shard in self._full) + sum(file.tokens for file in self._open.values())

    def sync(self) -> dict[str, Any]:
        """Put everything on the disk and tell where the writer stands, for `resume`."""
        for file in self._open.values():
            file.sync()
        sync(self._directory)
        return {
            "full": [asdict(shard) for shard in self._full],
            "open": [asdict(file.shard()) for file in self._open.values()],
        }

    def finish(self) -> tuple[Shard, ...]:
        """Close the files. What was written, for the index: train, held-out, then other splits by name."""
        for split in list(self._open):
            self._full.append(self._open.pop(split).close())
        names = sorted({shard.split for shard in self._full} - set(SPLITS))
        sync(self._directory)
        order = {split: place for place, split in enumerate([*SPLITS, *names])}
        self._full.sort(key=lambda shard: (order[shard.split], shard.file))
        return tuple(self._full)

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        for file in self._open.values():
            file.abandon()
        self._open.clear()

    def _file(self, split: str) -> _File:
        if split not in self._open:
            if not _NAME.fullmatch(split):
                raise ValueError(f"split {split!r}: a name is small letters, digits and hyphens")
            number = sum(shard.split == split for shard in self._full)
            self._open[split] = _File(split, self._directory / f"{split}-{number:05d}.bin")
        return self._open[split]


class _File:
    """A shard file that is still being written."""

    def __init__(self, split: str, path: Path) -> None:
        self.path, self._split = path, split
        self.tokens = self._documents = self._bytes = self._words = 0
        self._hash = hashlib.sha256()
        self._stream: BinaryIO = path.open("wb", buffering=_HASHED_AT_ONCE)

    @classmethod
    def reopened(cls, directory: Path, shard: Shard, itemsize: int) -> _File:
        file, size = cls.__new__(cls), shard.tokens * itemsize
        file.path, file._split = directory / shard.file, shard.split
        file.tokens, file._documents = shard.tokens, shard.documents
        file._bytes, file._words = shard.bytes, shard.words
        file._hash = hashlib.sha256()
        if not file.path.is_file() or file.path.stat().st_size < size:
            raise ShardError(
                f"{file.path}: missing or cut short since it was written; prepare the data again"
            )
        stream = file.path.open("r+b", buffering=_HASHED_AT_ONCE)
        stream.truncate(size)
        for block in _blocks(stream, size):
            file._hash.update(block)
        if file._hash.hexdigest() != shard.sha256:
            stream.close()
            raise ShardError(
                f"{file.path}: its bytes are not those that were written; prepare the data again"
            )
        file._stream = stream
        return file

    def append(self, data: NDArray[Any], documents: int, num_bytes: int, num_words: int) -> None:
        view = data.view(np.uint8).data
        self._hash.update(view)
        with self._errors_name_the_file():
            self._stream.write(view)
        self.tokens += len(data)
        self._documents += documents
        self._bytes += num_bytes
        self._words += num_words

    def shard(self) -> Shard:
        return Shard(
            split=self._split,
            file=self.path.name,
            tokens=self.tokens,
            documents=self._documents,
            bytes=self._bytes,
            words=self._words,
            sha256=self._hash.copy().hexdigest(),
        )

    def sync(self) -> None:
        with self._errors_name_the_file():
            self._stream.flush()
            os.fsync(self._stream.fileno())

    def close(self) -> Shard:
        self.sync()
        self._stream.close()
        return self.shard()

    def abandon(self) -> None:
        with contextlib.suppress(OSError):  # a full disk: what is not written is not counted either
            self._stream.close()

    @contextmanager
    def _errors_name_the_file(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(self.path)) from error


def _blocks(stream: BinaryIO, size: int) -> Iterator[bytes]:
    while size:
        block = stream.read(min(size, _HASHED_AT_ONCE))
        if not block:
            return
        size -= len(block)
        yield block
