"""From the reference's lines of token ids to shards: the stream put together again, cut into documents."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mobilellm.atomic import atomic_directory
from mobilellm.data.holding_out import check_share, digest_of, held_out_below
from mobilellm.data.reference_layout import Layout, Order, find_layout, read_sequences
from mobilellm.data.rejected import Rejected
from mobilellm.data.shard_index import (
    SPLITS,
    Shard,
    ShardError,
    ShardIndex,
    make_index,
    not_shards,
    write_index,
)
from mobilellm.data.shard_writer import SHARD_TOKENS, ShardWriter
from mobilellm.tokenizer import BOS_ID, EOS_ID, Tokenizer

LONGEST_DOCUMENT = 2**24
"""Tokens held in memory; a document longer than that is stored, and held out, in parts."""


def import_reference(
    source: Path,
    directory: Path,
    tokenizer: Tokenizer,
    held_out: float = 0.0,
    order: Order = "round-robin",
    add_bos: bool = False,
    licence: str | None = None,
    shard_tokens: int = SHARD_TOKENS,
    overwrite: bool = False,
    progress: Callable[[int], None] = lambda tokens: None,
) -> ShardIndex:
    """Write a folder of the reference's layout as shards, whole or not at all; the tokens stay as they are.

    The stream is cut into documents after each EOS and before each BOS, and where a line was rejected.
    With `add_bos` a document without a BOS gets one: amber-data-prep writes none, and document masking goes
    by it. Bad lines are listed in rejected.jsonl and counted by reason. Raises ShardError for another
    tokenizer than the folder was exported with, and where nothing can be used.
    """
    check_share(held_out)
    layout = find_layout(source)
    manifest = layout.manifest
    if manifest is not None and manifest.tokenizer != tokenizer.fingerprint:
        raise ShardError(
            f"{source}: made with tokenizer {manifest.tokenizer[:12]}…, not with this one "
            f"({tokenizer.fingerprint[:12]}…); give the tokenizer it was made with"
        )
    with atomic_directory(directory, overwrite, not_shards) as temporary:
        with (
            ShardWriter(temporary, tokenizer.vocab_size, shard_tokens) as writer,
            Rejected(temporary) as rejected,
        ):
            without_bos = 0
            for ids in _documents(source, layout, tokenizer.vocab_size, order, add_bos, rejected):
                without_bos += int(ids[0] != BOS_ID)
                text = tokenizer.decode(ids.tolist())
                out = held_out_below(np.array([digest_of(text)], dtype=np.uint64), held_out)[0]
                split = SPLITS[int(out)]
                writer.add(split, ids, len(text.encode()), len(text.split()))
                progress(writer.tokens)
            if not writer.tokens:
                raise ShardError(f"{source}: no line of it can be used (rejected: {rejected})")
            shards = writer.finish()
        _check_text(source, shards)
        index = make_index(
            tokenizer.vocab_size,
            tokenizer.fingerprint,
            manifest.source if manifest is not None else str(source),
            licence or (manifest.licence if manifest is not None else "not stated"),
            rejected.counts,
            shards,
            {
                "imported": "reference layout",
                "nodes": len(layout.nodes),
                "order": order,
                "held_out": held_out,
                "documents_without_bos": without_bos,
            },
        )
        tokenizer.save(temporary / "tokenizer")
        write_index(temporary, index)
    return index


def _documents(
    source: Path, layout: Layout, vocab_size: int, order: Order, add_bos: bool, rejected: Rejected
) -> Iterator[NDArray[np.int64]]:
    cutter = _Cutter(add_bos)
    for line in read_sequences(source, layout, vocab_size, order):
        if line.ids is not None:
            yield from cutter.feed(line.ids)
        else:
            rejected.add(line.file, {"line": line.number}, line.reason, line.text)
            yield from cutter.close()  # what follows is not what stood next to it
    yield from cutter.close()


class _Cutter:
    """Puts sequences together and cuts the stream after each EOS and before each BOS."""

    def __init__(self, add_bos: bool) -> None:
        self._add_bos = add_bos
        self._parts: list[NDArray[np.int64]] = []
        self._length = 0
        self._within = False  # the open document has parts that are already written

    def feed(self, ids: NDArray[np.int64]) -> Iterator[NDArray[np.int64]]:
        """The documents that `ids` complete."""
        before_bos = np.flatnonzero(ids == BOS_ID)
        after_eos = np.flatnonzero(ids == EOS_ID) + 1
        cuts = np.union1d(before_bos, after_eos)
        start = 0
        for cut in cuts.tolist():
            self._append(ids[start:cut])
            yield from self.close()
            start = cut
        self._append(ids[start:])
        if self._length >= LONGEST_DOCUMENT:
            yield from self.close()
            self._within = True

    def close(self) -> Iterator[NDArray[np.int64]]:
        """What is open, even if its end has not come."""
        if self._length:
            document = np.concatenate(self._parts)
            if self._add_bos and not self._within and document[0] != BOS_ID:
                document = np.concatenate([[BOS_ID], document])
            yield document
        self._parts, self._length, self._within = [], 0, False

    def _append(self, ids: NDArray[np.int64]) -> None:
        if len(ids):
            self._parts.append(ids)
            self._length += len(ids)


def _check_text(source: Path, shards: tuple[Shard, ...]) -> None:
    for shard in shards:
        if not shard.bytes or not shard.words:
            raise ShardError(
                f"{source}: {shard.tokens} tokens of the {shard.split} split spell no word; is it the "
                "tokenizer the data was made with?"
            )
