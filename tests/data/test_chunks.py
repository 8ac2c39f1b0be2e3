"""Chunks make up their file, end where documents end, and follow from where they begin."""

from __future__ import annotations

import io
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from mobilellm.data import chunks as chunks_module
from mobilellm.data import compression
from mobilellm.data.chunks import START, TOO_LONG_TO_READ, Chunk, Cutting, Place, text_chunks
from mobilellm.data.inputs import STDIN, Source
from mobilellm.data.records import records_of

LINES, SEPARATED, BLANK = (
    ("jsonl", Cutting()),
    ("text", Cutting("<|e|>")),
    ("text", Cutting(blank_lines=True)),
)
WHOLE = ("text", Cutting())
MARK = b"\xef\xbb\xbf"
KINDS = [LINES, SEPARATED, BLANK, WHOLE]
CONTENT = st.lists(
    st.sampled_from(["a", "bc", "\n", "\n", "\n\n", " ", "\r\n", "<|e|>", "<|e", "|>", "é"])
).map("".join)


def chunks(path: Path, kind: tuple[str, Cutting], size: int, place: Place = START) -> list[Chunk]:
    source = Source(str(path), kind[0], path.stat().st_size)  # type: ignore[arg-type]
    return list(text_chunks(source, place, kind[1], size))


@settings(deadline=None, max_examples=200)
@given(CONTENT, st.sampled_from(KINDS), st.integers(1, 30), st.integers(1, 7), st.data())
def test_chunks_make_up_the_file(
    tmp_path_factory: pytest.TempPathFactory,
    text: str,
    kind: tuple[str, Cutting],
    size: int,
    block: int,
    data: st.DataObject,
) -> None:
    path = tmp_path_factory.mktemp("chunks") / "file"
    content = text.encode()
    path.write_bytes(content)
    found = chunks(path, kind, size)
    with pytest.MonkeyPatch.context() as patch:  # what the disk gives at a time changes nothing
        patch.setattr(compression, "_PLAIN_BLOCK", max(6, block))
        assert [chunk[:5] for chunk in chunks(path, kind, size)] == [chunk[:5] for chunk in found]
    assert b"".join(chunk.content for chunk in found) == content  # type: ignore[misc]
    offset = 0
    for chunk in found:
        assert chunk.number == 1 + content[:offset].count(b"\n")
        offset += chunk.size
        if chunk is not found[-1]:
            assert chunk.next == Place(0, offset, 1 + content[:offset].count(b"\n"))
            assert isinstance(chunk.content, bytes)
            end = {LINES: b"\n", SEPARATED: b"<|e|>", BLANK: b"\n"}[kind]
            assert chunk.content.endswith(end)
            assert chunk.content.count(end) == 1 or len(chunk.content) <= size or kind == BLANK
    if found:
        at = data.draw(st.integers(0, len(found) - 1))
        if found[at].next.source == 0:
            rest = chunks(path, kind, size, found[at].next)
            assert [chunk[:5] for chunk in rest] == [chunk[:5] for chunk in found[at + 1 :]]
    assert found or kind != WHOLE  # an empty file is an empty document


BYTES = st.lists(
    st.sampled_from(
        [
            *(
                b"a",
                b"\n",
                b"\n\n",
                b" \t",
                b"\r\n",
                b"<|e|>",
                b"<|e",
                b"\xe9",
                b"\xc3\xa9",
                MARK,
                b"\0",
                b"\x0c",
            ),
            *(b'{"text":"x"}', b'{"text":"y"}\n'),
        ]
    ),
    max_size=30,
).map(b"".join)


@settings(deadline=None, max_examples=200)
@given(BYTES, st.sampled_from([*KINDS, ("text", Cutting("\n\n"))]), st.integers(1, 20))
@example(b"<|e|>" + MARK + b"a", SEPARATED, 1)
@example(b"a--b-----c---d", ("text", Cutting("--")), 9)  # which of five hyphens are the separator?
def test_records_do_not_depend_on_where_chunks_end(
    tmp_path_factory: pytest.TempPathFactory, content: bytes, kind: tuple[str, Cutting], size: int
) -> None:
    path = tmp_path_factory.mktemp("records") / "file"
    path.write_bytes(content)
    small, large = (
        [
            record
            for chunk in chunks(path, kind, at_least)
            for record in records_of(chunk, "text", kind[1], {})
        ]
        for at_least in (size, 10**6)
    )
    assert small == large


def test_the_mark_of_windows_editors(tmp_path: Path) -> None:
    """It is none of the text in front of a file, and nothing else in the middle of one."""
    for kind, content, expected in (
        (LINES, MARK + b'{"text": "a"}\n', ("a", "")),
        (WHOLE, MARK + b"a", ("a", "")),
        (WHOLE, MARK, ("", "")),
        (LINES, b"\n" + MARK + b'{"text": "a"}\n', ('\ufeff{"text": "a"}', "unreadable line")),
        (SEPARATED, b"<|e|>" + MARK + b"a", ("\ufeffa", "")),
    ):
        (tmp_path / "file").write_bytes(content)
        found = [list(records_of(chunk, "text", kind[1], {})) for chunk in chunks(tmp_path / "file", kind, 1)]
        assert [record[1:] for records in found for record in records] == [expected]


def test_what_is_too_long_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunks_module, "LONGEST_BYTES", 50)
    monkeypatch.setattr(compression, "_PLAIN_BLOCK", 16)
    path = tmp_path / "file"
    path.write_bytes(b"short\n" + b"x" * 500 + b"\nshort again\n" + b"y" * 51)
    found = chunks(path, LINES, 10)
    assert [(chunk.content, chunk.number, chunk.problem) for chunk in found] == [
        (b"short\n", 1, ""),
        (b"", 2, TOO_LONG_TO_READ),
        (b"short again\n", 3, ""),
        (b"", 4, TOO_LONG_TO_READ),
    ]
    assert chunks(path, LINES, 10, found[1].next)[0].content == b"short again\n"
    (whole,) = chunks(path, WHOLE, 10)
    assert (whole.content, whole.problem) == (b"", TOO_LONG_TO_READ)


def stdin(monkeypatch: pytest.MonkeyPatch, content: bytes) -> None:
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(content)))


def test_standard_input_must_give_the_same_again(monkeypatch: pytest.MonkeyPatch) -> None:
    content = b"".join(b"line %d\n" % i for i in range(100))
    source = Source(STDIN, "jsonl")

    def read(place: Place, seen: str) -> list[Chunk]:
        return list(text_chunks(source, place, Cutting(), 100, seen))

    stdin(monkeypatch, content)
    whole = read(START, "")
    assert b"".join(chunk.content for chunk in whole) == content  # type: ignore[misc]
    for number in (0, 3, len(whole) - 1):
        stdin(monkeypatch, content)
        assert read(whole[number].next, whole[number].seen) == whole[number + 1 :]
    for other in (content.replace(b"line 3\n", b"line 4\n"), content[:50], b""):
        stdin(monkeypatch, other)
        with pytest.raises(ValueError, match="standard input: not what it gave before"):
            read(whole[5].next, whole[5].seen)
