"""The records of a chunk: each gives a text, or a reason why it has none."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

from mobilellm.data.chunks import Chunk, Cutting

NOT_JSON, NO_OBJECT = "unreadable line", "not an object"
NO_FIELD, NOT_TEXT = "no text field", "not text"
NOT_UTF8 = "not UTF-8"

Record = tuple[int, str, str]
"""Line or row, text, what is wrong with it (or "")."""

_blank_lines = re.compile(rb"\n(?:[ \t\r]*\n)+")
_surrogate = re.compile("[\ud800-\udfff]")
_leading_blank_lines = re.compile(rb"(?:[ \t\r]*\n)*").match


def records_of(chunk: Chunk, text_field: str, cutting: Cutting, fields: dict[str, None]) -> Iterator[Record]:
    """The records in order. Names found where the text field is missing are added to `fields`.

    Blank lines between JSON lines, and nothing between two separators, are no records.
    """
    if chunk.problem:
        return iter([(chunk.number, "", chunk.problem)])
    if not isinstance(chunk.content, bytes):
        return _rows(chunk, chunk.content, fields)
    if chunk.format == "jsonl":
        return _lines(chunk.content, chunk.number, text_field, fields)
    return _texts(chunk.content, chunk.number, cutting)


def is_unicode(text: str) -> bool:
    """Whether it has no lone surrogates, which JSON can carry but UTF-8 cannot."""
    return text.isascii() or not _surrogate.search(text)


def _rows(chunk: Chunk, values: list[Any], fields: dict[str, None]) -> Iterator[Record]:
    for number, value in enumerate(values, chunk.number):
        if isinstance(value, str):
            yield number, value, ""
        elif isinstance(value, bytes):
            yield number, *_decoded(value)
        elif chunk.fields:
            fields.update(dict.fromkeys(chunk.fields))
            yield number, "", NO_FIELD
        else:
            yield number, "" if value is None else repr(value), NOT_TEXT


def _lines(content: bytes, first: int, text_field: str, fields: dict[str, None]) -> Iterator[Record]:
    for number, line in enumerate(content.split(b"\n"), first):
        if not line or line.isspace():
            continue
        try:
            text = line.decode()
        except UnicodeDecodeError:
            yield number, line.decode(errors="replace"), NOT_UTF8
            continue
        try:
            record: Any = json.loads(text)
        except (ValueError, RecursionError):
            yield number, text, NOT_JSON
            continue
        if not isinstance(record, dict):
            yield number, text, NO_OBJECT
        elif text_field not in record:
            fields.update(dict.fromkeys(record))
            yield number, text, NO_FIELD
        elif not isinstance(record[text_field], str):
            yield number, text, NOT_TEXT
        else:
            yield number, record[text_field], ""


def _texts(content: bytes, first: int, cutting: Cutting) -> Iterator[Record]:
    if cutting == Cutting():
        yield first, *_decoded(content)
        return
    separator = _blank_lines if cutting.blank_lines else re.compile(re.escape(cutting.separator.encode()))
    ends = [(match.start(), match.end()) for match in separator.finditer(content)]
    number, start = first, 0
    for end, following in [*ends, (len(content), len(content))]:
        part = content[start:end]
        if part and not part.isspace():
            before = _end_of_blank_lines(part)
            text, problem = _decoded(part[before:])
            yield number + part.count(b"\n", 0, before), text.rstrip("\r\n"), problem
        number += content.count(b"\n", start, following)
        start = following


def _end_of_blank_lines(content: bytes) -> int:
    found = _leading_blank_lines(content)
    return found.end() if found else 0


def _decoded(content: bytes) -> tuple[str, str]:
    try:
        return content.decode(), ""
    except UnicodeDecodeError:
        return content.decode(errors="replace"), NOT_UTF8
