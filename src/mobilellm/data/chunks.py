"""Inputs cut into chunks of about a mebibyte that end where documents end: the unit of work and of going on.

Where a chunk ends follows from where it begins, so that reading may stop after any chunk and begin again.
"""

from __future__ import annotations

import hashlib
import itertools
import re
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from mobilellm.data.compression import Blocks, DamagedFileError, open_blocks
from mobilellm.data.inputs import STDIN, Source

CHUNK_BYTES = 2**20
LONGEST_BYTES = 2**27
"""A line or document above this is not read: 128 MiB."""
TOO_LONG_TO_READ = "over 128 MiB"

_MARK = b"\xef\xbb\xbf"  # editors on Windows put it in front of a file


class Place(NamedTuple):
    """Where the next chunk begins: the source, the bytes (of tables: rows) before it, its first line."""

    source: int
    offset: int
    number: int


START = Place(0, 0, 1)


class Chunk(NamedTuple):
    """Bytes of whole lines or documents, or the text values of some rows; or what keeps them from being read.

    `number` is the first line (from 1) or row (from 0), `read` the bytes of the file read so far, `seen` a
    digest of all that standard input gave so far. `fields` are there only where rows lack the text field.
    """

    format: str
    source: int
    content: bytes | list[Any]
    number: int
    next: Place
    read: int
    problem: str = ""
    fields: tuple[str, ...] = ()
    seen: str = ""

    @property
    def size(self) -> int:
        if isinstance(self.content, bytes):
            return len(self.content)
        return sum(len(value) for value in self.content if isinstance(value, str | bytes))


class Cutting(NamedTuple):
    """Where documents end in plain text: at a separator, at blank lines, or (neither) with the file."""

    separator: str = ""
    blank_lines: bool = False


def text_chunks(
    source: Source, place: Place, cutting: Cutting, size: int = CHUNK_BYTES, seen: str = ""
) -> Iterator[Chunk]:
    """Chunks of a text or JSONL file, or of standard input, from `place` on.

    `seen` is what standard input must have given before; ValueError if it gives something else now.
    """
    if source.name == STDIN:
        yield from _chunks_of_stdin(source, place, cutting, size, seen)
        return
    stream, blocks = open_blocks(Path(source.name))
    with stream:
        yield from _chunks(source, blocks, blocks.skip(place.offset), place, cutting, size, None)


def _chunks_of_stdin(source: Source, place: Place, cutting: Cutting, size: int, seen: str) -> Iterator[Chunk]:
    # Unbuffered: a buffer has a lock, and a thread that waits for input with it makes the interpreter abort.
    blocks, digest = Blocks(getattr(sys.stdin.buffer, "raw", sys.stdin.buffer)), hashlib.sha256()
    following, left = iter(blocks), place.offset
    rest = b""
    while left and (block := next(following, b"")):
        digest.update(block[:left])
        left, rest = max(0, left - len(block)), block[left:]
    if left or (place.offset and digest.hexdigest() != seen):
        raise ValueError(
            "standard input: not what it gave before the interruption; give the same again, or --fresh to "
            "start over"
        )
    yield from _chunks(source, blocks, itertools.chain([rest], following), place, cutting, size, digest)


def _chunks(
    source: Source,
    blocks: Blocks,
    following: Iterable[bytes],
    place: Place,
    cutting: Cutting,
    size: int,
    digest: Any,
) -> Iterator[Chunk]:
    whole_file = source.format == "text" and cutting == Cutting()
    boundary = None if whole_file else _boundary(source, cutting)
    number, offset = place.number, place.offset
    end = Place(place.source + 1, 0, 1)
    try:
        for piece in _pieces(following, boundary, size, digest):
            content = piece.content if offset else piece.content.removeprefix(_MARK)
            first, number, offset = number, number + piece.lines, offset + piece.size
            yield Chunk(
                source.format,
                place.source,
                content,
                first,
                Place(place.source, offset, number),
                blocks.position,
                TOO_LONG_TO_READ if piece.too_long else "",
                seen=digest.hexdigest() if digest else "",
            )
    except DamagedFileError as error:
        yield Chunk(source.format, place.source, b"", number, end, blocks.position, str(error))
        return
    if whole_file and offset == 0:  # a document without text
        yield Chunk(source.format, place.source, b"", number, end, blocks.position)


class _Piece(NamedTuple):
    """Consecutive bytes of a stream; `content` is b"" where they were too long to keep."""

    content: bytes
    size: int
    lines: int
    too_long: bool = False


def _pieces(
    blocks: Iterable[bytes], boundary: _Boundary | None, at_least: int, digest: Any
) -> Iterator[_Piece]:
    """The stream in pieces that end at the last boundary before `at_least` bytes, else at the first after.

    Of a damaged stream, what ends at a boundary comes before the error.
    """
    buffer = bytearray()
    dropped = _Piece(b"", 0, 0, too_long=True)
    searched = 0
    damage: DamagedFileError | None = None
    following = iter(blocks)
    while True:
        try:
            buffer += next(following)
        except StopIteration:
            break
        except DamagedFileError as error:
            damage = error
            break
        while len(buffer) >= at_least or dropped.size:
            end = 0
            if boundary is not None:
                end = 0 if dropped.size or searched else boundary.last_end(buffer, at_least)
                end = end or boundary.first_end(buffer, searched)
            if not end:
                searched = boundary.where_to_go_on(buffer) if boundary is not None else len(buffer)
                break
            piece, dropped = _taken(buffer, end, dropped, digest), _Piece(b"", 0, 0, too_long=True)
            searched = 0
            yield piece
        if len(buffer) > LONGEST_BYTES or dropped.size:
            dropped = _taken(buffer, searched, dropped, digest, drop=True)
            searched = 0
    end = len(buffer)
    if damage is not None:
        end = boundary.last_end(buffer, end) if boundary is not None and not dropped.size else 0
    if end or (dropped.size and damage is None):
        yield _taken(buffer, end, dropped, digest)
    if damage is not None:
        raise damage


def _taken(buffer: bytearray, end: int, dropped: _Piece, digest: Any, drop: bool = False) -> _Piece:
    """Take `end` bytes out of the buffer; with what was dropped before them they make one piece."""
    content = bytes(buffer[:end])
    del buffer[:end]
    if digest is not None:
        digest.update(content)
    size, lines = dropped.size + end, dropped.lines + content.count(b"\n")
    too_long = drop or size > LONGEST_BYTES
    return _Piece(b"" if too_long else content, size, lines, too_long)


class _Boundary(Protocol):
    """Where a document may end. All take and give numbers of bytes; 0 is "nowhere"."""

    def last_end(self, buffer: bytearray, limit: int) -> int: ...

    def first_end(self, buffer: bytearray, start: int) -> int: ...

    def where_to_go_on(self, buffer: bytearray) -> int:
        """Before this there is none, whatever follows."""


class _Separator:
    def __init__(self, separator: bytes) -> None:
        self._separator = separator

    def last_end(self, buffer: bytearray, limit: int) -> int:
        if len(self._separator) == 1:
            return buffer.rfind(self._separator, 0, limit) + 1
        end = 0  # from the left, as records are cut: of "-----" the first four are two "--"
        while (found := buffer.find(self._separator, end, limit)) >= 0:
            end = found + len(self._separator)
        return end

    def first_end(self, buffer: bytearray, start: int) -> int:
        found = buffer.find(self._separator, start)
        return found + len(self._separator) if found >= 0 else 0

    def where_to_go_on(self, buffer: bytearray) -> int:
        return max(0, len(buffer) - len(self._separator) + 1)


class _BlankLine:
    _pattern = re.compile(rb"\n[ \t\r]*\n")

    def last_end(self, buffer: bytearray, limit: int) -> int:
        end = 0
        for match in self._pattern.finditer(buffer, 0, limit):
            end = match.end()
        return end

    def first_end(self, buffer: bytearray, start: int) -> int:
        match = self._pattern.search(buffer, start)
        return match.end() if match else 0

    def where_to_go_on(self, buffer: bytearray) -> int:
        found = buffer.rfind(b"\n")
        return found if found >= 0 else len(buffer)


def _boundary(source: Source, cutting: Cutting) -> _Boundary:
    if source.format == "jsonl":
        return _Separator(b"\n")
    return _BlankLine() if cutting.blank_lines else _Separator(cutting.separator.encode())
