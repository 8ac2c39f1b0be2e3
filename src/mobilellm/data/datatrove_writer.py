"""Steps for datatrove pipelines: every task writes its documents as a folder of shards, the last step merges.

datatrove brings the readers, filters, near-duplicate removal and the executors (local, Slurm, Ray); see
docs/large-corpora.md. Needs the extra mobilellm[datatrove].
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from datatrove.data import Document
from datatrove.pipeline.base import PipelineStep
from numpy.typing import NDArray

from mobilellm.atomic import atomic_directory
from mobilellm.data.chunks import START, Chunk
from mobilellm.data.corpus import DUPLICATE
from mobilellm.data.digests import DigestSet
from mobilellm.data.holding_out import check_share, held_out_below
from mobilellm.data.rejected import Rejected
from mobilellm.data.screening import Examined, Screen, ScreenSettings
from mobilellm.data.shard_index import SPLITS, make_index, not_shards, write_index
from mobilellm.data.shard_merge import PART, is_merged, merge_shards
from mobilellm.data.shard_writer import SHARD_TOKENS, ShardWriter
from mobilellm.tokenizer import Tokenizer

_DOCUMENTS_AT_ONCE, _CHARACTERS_AT_ONCE = 256, 2**22


class ShardsWriter(PipelineStep):  # type: ignore[misc]
    """Tokenises what comes and writes it to FOLDER/part-RANK, whole or not at all; hands documents on.

    A part is a folder of shards with an index of its own, and empty where no documents came. A task that is
    run again begins anew. Ids and counts, what is empty, and what is held out (by the hash of its text) are
    those of `mobilellm prepare`. An exact duplicate is dropped if it comes to the same task (12 to 24 bytes
    of memory a document; `drop_duplicates=False` spares them); among tasks only an earlier step can find
    them. FOLDER is a path that all tasks see.
    """

    type = "💾 - WRITER"
    name = "📱 mobilellm shards"

    def __init__(
        self,
        folder: str | Path,
        tokenizer: str | Path,
        source: str,
        licence: str = "not stated",
        held_out: float = 0.005,
        drop_duplicates: bool = True,
        shard_tokens: int = SHARD_TOKENS,
    ) -> None:
        super().__init__()
        check_share(held_out)
        self.folder, self.tokenizer = _path(folder), _path(tokenizer)
        self.source, self.licence, self.held_out = source, licence, held_out
        self.drop_duplicates, self.shard_tokens = drop_duplicates, shard_tokens

    def run(self, data: Iterable[Document] | None, rank: int = 0, world_size: int = 1) -> Iterator[Document]:
        tokenizer = Tokenizer.load(self.tokenizer)
        target = self.folder / f"part-{rank:05d}"
        for left_behind in self.folder.glob(f"{target.name}.tmp-*"):  # by a killed task of this rank
            shutil.rmtree(left_behind, ignore_errors=True)
        with atomic_directory(target, overwrite=True, objection=not_shards) as temporary:
            with (
                ShardWriter(temporary, tokenizer.vocab_size, self.shard_tokens) as writer,
                Rejected(temporary) as rejected,
            ):
                screen, seen = Screen(ScreenSettings(), tokenizer), DigestSet()
                for documents in _batches(data or ()):
                    with self.track_time("batch"):
                        texts: list[Any] = [document.text for document in documents]
                        examined = screen.examine(Chunk("rows", 0, texts, 0, START, 0))
                        self._write(documents, examined, writer, rejected, seen)
                    yield from documents
                shards = writer.finish()
            preparation = {
                "held_out": self.held_out,
                "deduplicate": "within each part" if self.drop_duplicates else False,
                PART: {"rank": rank, "of": world_size},
            }
            index = make_index(
                tokenizer.vocab_size, tokenizer.fingerprint, self.source, self.licence, rejected.counts,
                shards, preparation,
            )  # fmt: skip
            tokenizer.save(temporary / "tokenizer")
            write_index(temporary, index)

    def _write(
        self,
        documents: list[Document],
        examined: Examined,
        writer: ShardWriter,
        rejected: Rejected,
        seen: DigestSet,
    ) -> None:
        self.stat_update("total", value=len(documents))
        numbers = np.array(examined.numbers, dtype=np.int64)
        new = np.ones(len(numbers), dtype=np.bool_)
        if self.drop_duplicates:
            new = seen.add(examined.digests)
        reasons = {rejection.number: rejection.reason for rejection in examined.rejections}
        reasons |= dict.fromkeys(numbers[~new].tolist(), DUPLICATE)
        for number, reason in sorted(reasons.items()):
            self.stat_update("dropped", f"dropped_{reason}")
            document = documents[number]
            file = str(document.metadata.get("file_path", self.source))
            rejected.add(file, {"document": document.id}, reason, document.text)
        ids = np.frombuffer(examined.ids, dtype=writer.dtype)
        below = held_out_below(examined.digests, self.held_out)
        for split, side in zip(SPLITS, (new & ~below, new & below), strict=True):
            self._add(split, ids, examined.counts, side, writer)

    def _add(
        self,
        split: str,
        ids: NDArray[Any],
        counts: NDArray[np.int64],
        side: NDArray[np.bool_],
        writer: ShardWriter,
    ) -> None:
        if not side.any():
            return
        chosen = counts[side]
        writer.add_many(split, ids[np.repeat(side, counts[:, 0])], chosen[:, 0], chosen[:, 1], chosen[:, 2])
        self.stat_update("forwarded", split, value=len(chosen))
        for tokens in chosen[:, 0].tolist():
            self.stat_update("tokens", value=tokens, unit="doc")


class MergeShards(PipelineStep):  # type: ignore[misc]
    """The last step, for one task: `merge_shards` of what all tasks of ShardsWriter have written.

    A folder that holds just these already is left alone; one that holds anything else is refused.
    """

    type = "💾 - WRITER"
    name = "📱 mobilellm shards, merged"

    def __init__(self, parts: str | Path, folder: str | Path) -> None:
        super().__init__()
        self.parts, self.folder = _path(parts), _path(folder)

    def run(self, data: Any = None, rank: int = 0, world_size: int = 1) -> None:
        if world_size != 1:
            raise ValueError(f"merging is for one task, not for {world_size}; give its executor tasks=1")
        try:
            merge_shards([self.parts], self.folder)
        except FileExistsError:
            if not is_merged([self.parts], self.folder):
                raise FileExistsError(
                    f"{self.folder}: holds something else than these shards; remove it or name another folder"
                ) from None


def _path(path: str | Path) -> Path:
    if "://" in str(path):
        raise ValueError(f"{path}: shards are memory-mapped files; name a folder of a file system")
    return Path(path).absolute()  # tasks may run elsewhere


def _batches(data: Iterable[Document]) -> Iterator[list[Document]]:
    batch: list[Document] = []
    characters = 0
    for document in data:
        batch.append(document)
        characters += len(document.text)
        if len(batch) >= _DOCUMENTS_AT_ONCE or characters >= _CHARACTERS_AT_ONCE:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch
