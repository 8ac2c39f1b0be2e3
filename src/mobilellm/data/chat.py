"""Files of conversations, read and encoded: JSON, JSON lines and parquet, each plain or packed.

What cannot be used is counted by reason and kept with its place; nothing is left out in silence.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from mobilellm.chat_template import ChatTemplate, Conversation
from mobilellm.data.compression import SUFFIXES, DamagedFileError, open_blocks
from mobilellm.data.conversation_shapes import NoTalkError, Talk, talk_of
from mobilellm.data.holding_out import digest_of, held_out_below
from mobilellm.data.records import NO_OBJECT, NOT_JSON, NOT_UTF8

EMPTY_ANSWER, TOO_LONG = "empty answer", "too long"
REFUSED, CUT_AWAY = "refused by the template", "answer cut away"

_FORMATS = {".json": "json", ".jsonl": "jsonl", ".ndjson": "jsonl", ".parquet": "parquet"}
_EXCERPT = 80


class Place(NamedTuple):
    file: str
    unit: str
    """What `number` counts: line (from 1), record or row (from 0)."""
    number: int


class Skip(NamedTuple):
    """A record that is not used: where, why (to count by), and in words."""

    place: Place
    reason: str
    words: str


class Found(NamedTuple):
    """What a file holds at a place: a conversation, or why there is none."""

    place: Place
    talk: Talk | Skip


@dataclass(frozen=True)
class Conversations:
    """Encoded conversations one after the other: tokens (N,), which are trained (N,), where each ends."""

    tokens: NDArray[np.int32]
    trained: NDArray[np.bool_]
    ends: NDArray[np.int64]
    digests: NDArray[np.uint64]
    """Of the text of each, by which it is held out or not."""

    def __len__(self) -> int:
        return len(self.ends)

    @cached_property
    def starts(self) -> NDArray[np.int64]:
        return np.concatenate(([0], self.ends[:-1])).astype(np.int64)

    @property
    def lengths(self) -> NDArray[np.int64]:
        return self.ends - self.starts

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of all of it: what a checkpoint is compared by."""
        digest = hashlib.sha256()
        for part in (self.tokens, self.trained, self.ends):
            digest.update(np.ascontiguousarray(part).tobytes())
        return digest.hexdigest()

    def those(self, chosen: NDArray[np.bool_]) -> Conversations:
        """Only those where `chosen` (number of conversations,) says so, in the same order."""
        inside = np.repeat(chosen, self.lengths)
        ends = np.cumsum(self.lengths[chosen])
        return Conversations(self.tokens[inside], self.trained[inside], ends, self.digests[chosen])


@dataclass
class ReadChat:
    """What reading files of conversations gave."""

    conversations: Conversations
    skips: list[Skip] = field(default_factory=list)
    truncated: int = 0
    """Conversations that were cut to fit."""

    @property
    def counts(self) -> dict[str, int]:
        """How many records were not used, by reason, the most frequent first."""
        return dict(Counter(skip.reason for skip in self.skips).most_common())


def read_chat(
    files: Sequence[Path],
    template: ChatTemplate,
    most_tokens: int,
    truncate: bool = False,
    report: Callable[[int], None] = lambda records: None,
) -> ReadChat:
    """Read and encode all conversations of `files`; of those longer than `most_tokens`, skip or cut.

    `report` is told after every record how many there were. Raises FileNotFoundError or ValueError naming
    the file for what cannot be read, ValueError where nothing is left.
    """
    tokens, trained, lengths, digests = list[NDArray[Any]](), list[NDArray[Any]](), list[int](), list[int]()
    out = ReadChat(_none())
    records = 0
    for place, talk in read_talks(files):
        records += 1
        encoded = encode(place, talk, template, most_tokens, truncate)
        report(records)
        if isinstance(encoded, Skip):
            out.skips.append(encoded)
            continue
        assert isinstance(talk, Talk)
        ids, mine = encoded
        out.truncated += len(ids) > most_tokens
        tokens.append(np.array(ids[:most_tokens], dtype=np.int32))
        trained.append(np.array(mine[:most_tokens], dtype=np.bool_))
        lengths.append(len(tokens[-1]))
        digests.append(digest_of(json.dumps([talk.messages, talk.tools], sort_keys=True)))
    if not lengths:
        names, counts = ", ".join(map(str, files)), said(out.counts) or "no records"
        first = f"; the first: {out.skips[0].words}" if out.skips else ""
        raise ValueError(f"{names}: no conversation to learn from ({counts}{first})")
    out.conversations = Conversations(
        np.concatenate(tokens),
        np.concatenate(trained),
        np.cumsum(lengths, dtype=np.int64),
        np.array(digests, dtype=np.uint64),
    )
    return out


def encode(
    place: Place, talk: Talk | Skip, template: ChatTemplate, most_tokens: int, truncate: bool = False
) -> Conversation | Skip:
    """All tokens of a conversation, also where it is to be cut to `most_tokens`; or why it is not used."""
    if isinstance(talk, Skip):
        return talk
    answers = [message for message in talk.messages if message["role"] == "assistant"]
    excerpt = talk.messages[0]["content"][:_EXCERPT]
    if not any(answer["content"] or answer.get("tool_calls") for answer in answers):
        return Skip(place, EMPTY_ANSWER, excerpt)
    try:
        made = template.conversation(talk.messages, talk.tools)
    except ValueError as error:
        return Skip(place, REFUSED, str(error))
    if len(made.tokens) > most_tokens:
        if not truncate:
            return Skip(
                place, TOO_LONG, f"{len(made.tokens):,} tokens, {most_tokens:,} are the most: {excerpt}"
            )
        if not any(made.trained[1:most_tokens]):
            return Skip(place, CUT_AWAY, f"{len(made.tokens):,} tokens: {excerpt}")
    return made


def held_out_ones(conversations: Conversations, share: float) -> NDArray[np.bool_]:
    """Which are held out: this share by the hash of the text, and at least one unless `share` is 0."""
    chosen = held_out_below(conversations.digests, share)
    if share and not chosen.any():
        chosen = conversations.digests == conversations.digests.min()
    return chosen


def said(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{count:,} {reason}" for reason, count in counts.items())


def read_talks(files: Iterable[Path]) -> Iterator[Found]:
    """Every record of every file in order, as a conversation or as why it is none. Folders are searched."""
    for path in _searched(files):
        for place, record in read_records(path):
            if isinstance(record, Skip):
                yield Found(place, record)
                continue
            try:
                yield Found(place, talk_of(record))
            except NoTalkError as error:
                yield Found(place, Skip(place, error.reason, str(error)))


def _searched(paths: Iterable[Path]) -> Iterator[Path]:
    """The files, and in place of a folder those in it that can hold conversations, in the order of names."""
    for path in paths:
        if not path.is_dir():
            yield path
            continue
        found = sorted(file for file in path.rglob("*") if _format(file) is not None and file.is_file())
        if not found:
            raise FileNotFoundError(f"{path}: holds no file of conversations ({', '.join(_FORMATS)})")
        yield from found


def _format(path: Path) -> str | None:
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] in SUFFIXES:
        suffixes.pop()
    return _FORMATS.get(suffixes[-1]) if suffixes else None


def read_records(path: Path) -> Iterator[tuple[Place, Mapping[str, Any] | Skip]]:
    """Objects of a file, or why a line holds none. Raises FileNotFoundError, ValueError naming the file."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file of conversations")
    kind = _format(path)
    if kind is None:
        raise ValueError(f"{path}: conversations are read from {', '.join(_FORMATS)} files, packed or not")
    if kind == "parquet":
        return _rows(path)
    try:
        stream, blocks = open_blocks(path)
        with stream:
            content = b"".join(blocks)
    except DamagedFileError as error:
        raise ValueError(f"{path}: {error}") from None
    content = content.removeprefix(b"\xef\xbb\xbf")
    return _lines(path, content) if kind == "jsonl" else _json(path, content)


def _json(path: Path, content: bytes) -> Iterator[tuple[Place, Mapping[str, Any] | Skip]]:
    """A list of objects, one object, or, under this name too, lines."""
    try:
        found = json.loads(content)
    except (ValueError, RecursionError) as error:
        if content.lstrip().startswith(b"["):
            raise ValueError(f"{path}: not JSON, or not all of it ({error})") from None
        yield from _lines(path, content)
        return
    for number, record in enumerate(found if isinstance(found, list) else [found]):
        place = Place(str(path), "record", number)
        yield place, record if isinstance(record, dict) else Skip(place, NO_OBJECT, repr(record)[:_EXCERPT])


def _lines(path: Path, content: bytes) -> Iterator[tuple[Place, Mapping[str, Any] | Skip]]:
    for number, line in enumerate(content.split(b"\n"), 1):
        if not line or line.isspace():
            continue
        place = Place(str(path), "line", number)
        excerpt = line[:_EXCERPT].decode(errors="replace")
        try:
            record = json.loads(line)
        except UnicodeDecodeError:
            yield place, Skip(place, NOT_UTF8, excerpt)
        except (ValueError, RecursionError):
            yield place, Skip(place, NOT_JSON, excerpt)
        else:
            yield place, record if isinstance(record, dict) else Skip(place, NO_OBJECT, excerpt)


def _rows(path: Path) -> Iterator[tuple[Place, Mapping[str, Any] | Skip]]:
    import pyarrow
    import pyarrow.parquet

    number = 0
    try:
        for batch in pyarrow.parquet.ParquetFile(path).iter_batches(1024):
            for record in _objects(batch):
                place = Place(str(path), "row", number)
                # A table has every column in every row: what a row does not have is null there.
                yield place, Skip(place, NOT_UTF8, "") if record is None else _without_nulls(record)
                number += 1
    except pyarrow.ArrowException as error:
        raise ValueError(f"{path}: damaged, or no parquet file ({str(error).splitlines()[0]})") from None


def _objects(batch: Any) -> list[Any]:
    """The rows; None for one with text that is no UTF-8, which not every writer checks."""
    try:
        return batch.to_pylist()  # type: ignore[no-any-return]
    except UnicodeDecodeError:
        if batch.num_rows == 1:
            return [None]
        return [record for row in range(batch.num_rows) for record in _objects(batch.slice(row, 1))]


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nulls(each) for key, each in value.items() if each is not None}
    return [_without_nulls(each) for each in value] if isinstance(value, list) else value


def _none() -> Conversations:
    return Conversations(
        np.empty(0, np.int32), np.empty(0, np.bool_), np.empty(0, np.int64), np.empty(0, np.uint64)
    )
