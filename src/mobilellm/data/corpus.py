"""What is kept of a corpus while it is prepared: shards, which texts were seen, what was rejected and why."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mobilellm.data.digests import DigestSet
from mobilellm.data.holding_out import held_out_below
from mobilellm.data.journal import Log
from mobilellm.data.rejected import REJECTED, line_of
from mobilellm.data.screening import Examined, Rejection, counted
from mobilellm.data.shard_index import SPLITS, Shard
from mobilellm.data.shard_writer import ShardWriter
from mobilellm.data.shards import Split

DUPLICATE, NEAR_DUPLICATE = "duplicate", "near duplicate"

_DIGESTS_AT_ONCE = 2**20
_DOCUMENTS_AT_ONCE = 4096
_COLUMNS = 4  # of documents.bin: digest, tokens, bytes, words


class Corpus:
    """Takes examined chunks in the order of the input; `sync` tells where it stands, a new one goes on there.

    Its memory grows by the digests alone: 12 to 24 bytes a document, and as much for each MinHash band.
    """

    def __init__(
        self,
        folder: Path,
        vocab_size: int,
        held_out: float,
        shard_tokens: int,
        deduplicate: bool,
        limit: int | None,
        state: Mapping[str, Any] | None = None,
    ) -> None:
        self._folder, self._shards = folder, folder / "shards"
        self._vocab_size, self._shard_tokens = vocab_size, shard_tokens
        self._held_out, self._limit = held_out, limit
        self._shards.mkdir(exist_ok=True)
        lengths = state["logs"] if state else {}
        self._rejected_log = Log(self._shards / REJECTED, lengths.get("rejected", 0))
        self._digest_log = Log(folder / "digests.bin", lengths.get("digests", 0))
        self._band_log = Log(folder / "bands.bin", lengths.get("bands", 0))
        self._document_log = Log(folder / "documents.bin", lengths.get("documents", 0))
        self._digests = _reread(folder / "digests.bin") if deduplicate else None
        self._bands = _reread(folder / "bands.bin")
        if state:
            self._writer = ShardWriter.resume(self._shards, vocab_size, state["writer"], shard_tokens)
        else:
            self._writer = ShardWriter(self._shards, vocab_size, shard_tokens)
        self.rejected: dict[str, int] = dict(state["rejected"]) if state else {}
        self.documents: int = state["documents"] if state else 0
        self.text_bytes: int = state["text_bytes"] if state else 0
        self._sides: set[str] = set(state["sides"]) if state else set()

    @property
    def records(self) -> int:
        """Everything seen: documents and what was rejected."""
        return self.documents + sum(self.rejected.values())

    @property
    def tokens(self) -> int:
        return self._writer.tokens

    @property
    def full(self) -> bool:
        return self._limit is not None and self.documents >= self._limit

    def take(self, source: str, unit: str, examined: Examined) -> None:
        """Keep what is new, list what is not. `source` is the file, `unit` what numbers count in it."""
        reasons = self._seen_before(examined)
        kept = np.flatnonzero(reasons == "")
        rejections = examined.rejections + [
            Rejection(examined.numbers[i], reasons[i], examined.excerpts[i])
            for i in np.flatnonzero(reasons != "").tolist()
        ]
        room = len(kept) if self._limit is None else self._limit - self.documents
        if room <= len(kept) and self._limit is not None:  # nothing after the last document was read
            kept = kept[:room]
            last = examined.numbers[kept[-1]] if len(kept) else 0
            rejections = [rejection for rejection in rejections if rejection.number < last]
        self._reject(source, unit, sorted(rejections, key=lambda rejection: rejection.number))
        self._keep(examined, kept)

    def sync(self) -> dict[str, Any]:
        """Put everything on the disk. Where the corpus stands, as values for JSON."""
        return {
            "writer": self._writer.sync(),
            "logs": {
                "rejected": self._rejected_log.sync(),
                "digests": self._digest_log.sync(),
                "bands": self._band_log.sync(),
                "documents": self._document_log.sync(),
            },
            "rejected": self.rejected,
            "documents": self.documents,
            "text_bytes": self.text_bytes,
            "sides": sorted(self._sides),
        }

    def finish(self) -> tuple[Path, tuple[Shard, ...]]:
        """Close the files: the folder of the shards, and what is in it. Call `sync` first.

        Each side gets a document: if none was held out, the one with the lowest digest; if none was left to
        train on, the one with the highest. The journal still stands for the folder as it was before.
        """
        shards = self._writer.finish()
        if len(self._sides) == len(SPLITS):
            return self._shards, shards
        return self._balanced(shards)

    def __enter__(self) -> Corpus:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._writer.__exit__(kind, value, trace)
        for log in (self._rejected_log, self._digest_log, self._band_log, self._document_log):
            log.close()

    def _seen_before(self, examined: Examined) -> NDArray[np.object_]:
        """Why each document is none to keep, or ""."""
        reasons = np.full(len(examined.numbers), "", dtype=object)
        if self._digests is not None:
            new = self._digests.add(examined.digests)
            self._digest_log.write(examined.digests[new].tobytes())
            reasons[~new] = DUPLICATE
        if examined.bands is not None:
            looked_at = np.flatnonzero(reasons == "")
            bands = examined.bands[looked_at]
            new = self._bands.add(bands.ravel())
            self._band_log.write(bands.ravel()[new].tobytes())
            near = ~new.reshape(bands.shape).all(axis=1)
            reasons[looked_at[near]] = NEAR_DUPLICATE
        return reasons

    def _reject(self, source: str, unit: str, rejections: list[Rejection]) -> None:
        self.rejected = counted(self.rejected, rejections)
        for number, reason, text in rejections:
            self._rejected_log.write(line_of(source, {unit: number}, reason, text).encode())

    def _keep(self, examined: Examined, kept: NDArray[np.int64]) -> None:
        ids = np.frombuffer(examined.ids, dtype=self._writer.dtype)
        counts = examined.counts
        held_out = held_out_below(examined.digests, self._held_out)
        chosen = np.zeros(len(counts), dtype=np.bool_)
        chosen[kept] = True
        for split, side in zip(SPLITS, (~held_out & chosen, held_out & chosen), strict=True):
            if not side.any():
                continue
            part = ids if side.all() else ids[np.repeat(side, counts[:, 0])]
            self._writer.add_many(split, part, counts[side, 0], counts[side, 1], counts[side, 2])
            self._sides.add(split)
        if len(self._sides) < len(SPLITS):
            rows = np.column_stack([examined.digests[kept], counts[kept].astype(np.uint64)])
            self._document_log.write(rows.tobytes())
        self.documents += len(kept)
        self.text_bytes += int(counts[kept, 1].sum())

    def _balanced(self, before: tuple[Shard, ...]) -> tuple[Path, tuple[Shard, ...]]:
        """All is on one side. Write it again, but for one document, which goes to the other."""
        (side,) = self._sides
        self._document_log.sync()
        rows = np.memmap(self._folder / "documents.bin", dtype=np.uint64, mode="r").reshape(-1, _COLUMNS)
        moved = int(rows[:, 0].argmin() if side == SPLITS[0] else rows[:, 0].argmax())
        folder = self._folder / "balanced"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        shutil.copy(self._shards / REJECTED, folder)
        tokens = Split(self._shards, before, self._writer.dtype.str)
        borders = [*range(0, len(rows), _DOCUMENTS_AT_ONCE), moved, moved + 1, len(rows)]
        start = 0
        with ShardWriter(folder, self._vocab_size, self._shard_tokens) as writer:
            for first, last in pairwise(sorted(set(borders))):
                counts = rows[first:last, 1:].astype(np.int64)
                end = start + int(counts[:, 0].sum())
                split = side if first != moved else next(name for name in SPLITS if name != side)
                writer.add_many(split, tokens[start:end], counts[:, 0], counts[:, 1], counts[:, 2])
                start = end
            return folder, writer.finish()


def _reread(file: Path) -> DigestSet:
    """The digests a log holds."""
    found = DigestSet()
    with file.open("rb") as stream:
        while len(digests := np.fromfile(stream, dtype=np.uint64, count=_DIGESTS_AT_ONCE)):
            found.add(digests)
    return found
