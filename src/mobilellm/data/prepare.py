"""From raw text of any size to a folder of token shards, on all cores, in memory that does not grow with it.

    sources -> chunks -> workers: documents, rules, token ids -> duplicates, split -> shards

The bytes that come out depend on the input and the settings alone: not on the number of workers, nor on how
often the work was interrupted. Everything is written in OUT.partial, with a journal of what is safe on the
disk; the same command goes on from there, and the folder takes its final name when it is whole.
"""

from __future__ import annotations

import errno
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import NamedTuple

from mobilellm.atomic import check_destination, take_name
from mobilellm.data.chunks import CHUNK_BYTES, START, Chunk, Cutting, Place
from mobilellm.data.corpus import Corpus
from mobilellm.data.inputs import Source
from mobilellm.data.journal import Workplace, forget
from mobilellm.data.near_duplicates import Bands, bands_for
from mobilellm.data.prepare_settings import (
    PrepareSettings,
    already_done,
    command_of,
    name_of,
    preparation_of,
    sources_of,
)
from mobilellm.data.readers import chunks_of
from mobilellm.data.records import NO_FIELD, NO_OBJECT, NOT_JSON, NOT_UTF8
from mobilellm.data.screening import Examined, ScreenSettings
from mobilellm.data.shard_index import ShardError, ShardIndex, make_index, not_shards, write_index
from mobilellm.data.workers import ReadAhead, Workers, bundles, in_order
from mobilellm.tokenizer import Tokenizer

_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_RECORDS_WITHOUT_FIELD = 10_000
"""So many records without the text field, and none with it, and the work stops: the name must be wrong."""


class Progress(NamedTuple):
    """How far it is. `seconds` and `session_bytes` count for this process, the rest from the start."""

    documents: int
    tokens: int
    text_bytes: int
    rejected: int
    read: int  # bytes of the input files
    size: int | None  # all of them; None where it is not known
    seconds: float
    session_bytes: int


@dataclass(frozen=True)
class Prepared:
    index: ShardIndex
    passed_over: tuple[str, ...]  # files in folders whose names told no format
    resumed: bool
    progress: Progress | None  # None if all was done before


class Stopped(Exception):  # noqa: N818 - not an error
    """`stop` was set: what is done is safe, and the same call goes on."""


def prepare(
    inputs: Sequence[str],
    tokenizer: Tokenizer,
    out: Path,
    settings: PrepareSettings | None = None,
    workers: int | None = None,
    overwrite: bool = False,
    fresh: bool = False,
    checkpoint_seconds: float = 5.0,
    chunk_bytes: int = CHUNK_BYTES,
    report: Callable[[Progress], None] = lambda progress: None,
    stop: threading.Event | None = None,
) -> Prepared:
    """Tokenise `inputs` into the folder of shards `out`. Call it again with the same arguments to go on.

    A crash costs at most the work of `checkpoint_seconds`. `workers` is a number of processes, by default one
    for each core. Raises ValueError, FileNotFoundError or OSError with one line; after an OSError (a full
    disk) the same call goes on. Raises Stopped soon after `stop` is set.
    """
    settings = settings or PrepareSettings()
    sources = sources_of(inputs, settings)
    out = Path(os.path.realpath(out))
    workers = _cores() if workers is None else workers
    if workers < 1:
        raise ValueError(f"workers = {workers} must be at least 1")
    if not 0 <= checkpoint_seconds < float("inf"):
        raise ValueError(f"checkpoint_seconds = {checkpoint_seconds} must be a number, 0 or above")
    command = command_of(sources, tokenizer, settings)
    if not overwrite and not fresh and (done := already_done(out, sources, tokenizer, settings)):
        forget(out, command)
        return Prepared(done, sources.passed_over, True, None)
    check_destination(out, overwrite, not_shards)
    stop = stop or threading.Event()
    bands = bands_for(settings.near_duplicates) if settings.near_duplicates is not None else None
    workplace = Workplace(out, command, fresh)
    corpus: Corpus | None = None
    try:
        corpus = Corpus(
            workplace.folder,
            tokenizer.vocab_size,
            settings.held_out,
            settings.shard_tokens,
            settings.deduplicate,
            settings.limit,
            workplace.state.get("corpus"),
        )
        run = _Run(sources.read, settings, corpus, workplace, report, stop, chunk_bytes)
        with corpus:
            run.go(workers, tokenizer, bands, checkpoint_seconds)
            run.refuse_too_little()
            folder, shards = corpus.finish()
            index = make_index(
                tokenizer.vocab_size,
                tokenizer.fingerprint,
                settings.source or name_of(sources.read),
                settings.licence,
                corpus.rejected,
                shards,
                preparation_of(sources, settings),
            )
            tokenizer.save(folder / "tokenizer")
            write_index(folder, index)
            take_name(folder, out, overwrite, not_shards)
        workplace.remove()
    except OSError as error:
        if error.errno in _NO_ROOM:
            what = f"{error.strerror}; what is done is kept: make room and give the same command to go on"
            raise OSError(error.errno, what, error.filename) from error
        raise
    finally:
        if corpus is not None and corpus.records == 0:
            workplace.remove()  # nothing to go on from
        workplace.close()
    return Prepared(index, sources.passed_over, run.resumed, run.progress())


class _Run:
    """One process's share of the work: reads, hands out, takes back in order, saves now and then."""

    def __init__(
        self,
        sources: tuple[Source, ...],
        settings: PrepareSettings,
        corpus: Corpus,
        workplace: Workplace,
        report: Callable[[Progress], None],
        stop: threading.Event,
        chunk_bytes: int,
    ) -> None:
        self.settings, self.corpus = settings, corpus
        self._sources, self._workplace, self._report, self._stop = sources, workplace, report, stop
        self._chunk_bytes = chunk_bytes
        state = workplace.state
        self.resumed = bool(state)
        self.place = Place(*state["place"]) if state else START
        self._seen, self._read = state.get("seen", ""), state.get("read", 0)
        self.fields: dict[str, None] = dict.fromkeys(state.get("fields", ()))
        self.finished = state.get("finished", False)
        sizes = [source.size for source in sources]
        self._before = [0, *accumulate(size or 0 for size in sizes)]
        """Bytes before each source; the last is all of them."""
        self._size = None if None in sizes else self._before[-1]
        self._began, self._bytes_before = time.monotonic(), corpus.text_bytes

    def go(self, workers: int, tokenizer: Tokenizer, bands: Bands | None, checkpoint_seconds: float) -> None:
        """Take in all there is, up to the limit."""
        if self.finished:
            return
        settings = self.settings
        screen = ScreenSettings(
            settings.text_field, settings.cutting, settings.min_characters, settings.max_characters,
            settings.quality, bands,
        )  # fmt: skip
        chunks = ReadAhead(self._readers(), max(1, min(8, workers // 2)), self._stop)
        pool = Workers(workers, screen, tokenizer)
        saved = time.monotonic()
        self._report(self.progress())
        try:
            for task, result in in_order(pool, bundles(chunks, self._chunk_bytes), 2 * workers + 1):
                for chunk, examined in zip(task, result, strict=True):
                    self._take(chunk, examined)
                self._report(self.progress())
                if self.corpus.full or self._stop.is_set():
                    break
                if time.monotonic() - saved >= checkpoint_seconds:
                    self.save()
                    saved = time.monotonic()
            self.finished = self.corpus.full or not self._stop.is_set()
            self.save()
        finally:
            pool.close()
        if not self.finished:
            raise Stopped

    def save(self) -> None:
        corpus = self.corpus.sync()
        self._workplace.save(
            {
                "place": self.place, "seen": self._seen, "read": self._read, "fields": list(self.fields),
                "finished": self.finished, "corpus": corpus,
            }
        )  # fmt: skip

    def progress(self) -> Progress:
        return Progress(
            self.corpus.documents,
            self.corpus.tokens,
            self.corpus.text_bytes,
            sum(self.corpus.rejected.values()),
            self._before[self.place.source] + (self._read if self.place.source < len(self._sources) else 0),
            self._size,
            time.monotonic() - self._began,
            self.corpus.text_bytes - self._bytes_before,
        )

    def _take(self, chunk: Chunk, examined: Examined) -> None:
        if self.corpus.full:
            return
        source = self._sources[chunk.source]
        self.corpus.take(source.name, "row" if chunk.format == "rows" else "line", examined)
        self.place, self._read, self._seen = chunk.next, chunk.read, chunk.seen
        self.fields.update(dict.fromkeys(examined.fields))
        if self.corpus.records >= _RECORDS_WITHOUT_FIELD:
            self._refuse_wrong_field()

    def _refuse_wrong_field(self) -> None:
        """If no record that could be read has the text field."""
        rejected = self.corpus.rejected
        without = sum(rejected.get(reason, 0) for reason in (NO_FIELD, NOT_JSON, NO_OBJECT, NOT_UTF8))
        if without < self.corpus.records or NO_FIELD not in rejected:
            return
        self._workplace.remove()
        raise ValueError(
            f"none of {self.corpus.records:,} records has the text field {self.settings.text_field!r}; they "
            f"have {', '.join(self.fields) or 'no fields'}: choose one with --text-field"
        )

    def refuse_too_little(self) -> None:
        """If there are no two documents: the work came to nothing."""
        corpus = self.corpus
        if corpus.documents >= 2:
            return
        self._refuse_wrong_field()
        self._workplace.remove()
        reasons = ", ".join(f"{count} {reason}" for reason, count in corpus.rejected.items())
        advice = "give more text"
        if any(source.format == "text" for source in self._sources) and self.settings.cutting == Cutting():
            advice += ", or cut it into documents with --document-separator or --split-on-blank-lines"
        if NOT_UTF8 in corpus.rejected:
            advice += "; texts in another encoding become UTF-8 by: iconv -f latin1 -t utf-8 FILE"
        left = f"{corpus.documents} {'document' if corpus.documents == 1 else 'documents'} left"
        raise ShardError(
            f"{name_of(self._sources)}: {left} "
            f"({reasons or 'nothing rejected'}); at least 2 are needed, one to train on and one to hold out; "
            f"{advice}"
        )

    def _readers(self) -> Iterator[Callable[[], Iterator[Chunk]]]:
        first, seen = self.place, self._seen
        for number in range(first.source, len(self._sources)):
            place = first if number == first.source else START._replace(source=number)
            yield partial(
                chunks_of,
                self._sources[number],
                place,
                self.settings,
                self._chunk_bytes,
                self._workplace.folder,
                seen,
            )


def _cores() -> int:
    """Processor cores this process may use."""
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # not Linux
        return os.cpu_count() or 1
