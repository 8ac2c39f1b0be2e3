"""Texts and reasons: every record is one or the other, with its line or row."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mobilellm.data.chunks import Chunk, Cutting, Place
from mobilellm.data.records import Record, is_unicode, records_of

NOWHERE, WHOLE = Place(0, 0, 1), Cutting()


def records(
    content: bytes | list[Any],
    format: str = "jsonl",
    cutting: Cutting = WHOLE,
    number: int = 1,
    **changes: Any,
) -> list[Record]:
    chunk = Chunk(format, 0, content, number, NOWHERE, 0, **changes)
    return list(records_of(chunk, "text", cutting, {}))


def test_json_lines() -> None:
    content = "\n".join(
        [
            '{"text": "one", "other": 1}',
            "",
            '{"text": "two\\nlines"} \r',
            "not json",
            "[1, 2]",
            '{"Text": "x"}',
            '{"text": null}',
            '{"text": ["x"]}',
            "   ",
            '{"text": "\\ud83d"}',
            '{"text": "cut',
            "[" * 100_000,
            '{"text": "last"}',
        ]
    ).encode()
    found = records(content, number=10)
    assert [(number, problem) for number, _, problem in found] == [
        (10, ""),
        (12, ""),
        (13, "unreadable line"),
        (14, "not an object"),
        (15, "no text field"),
        (16, "not text"),
        (17, "not text"),
        (19, ""),
        (20, "unreadable line"),
        (21, "unreadable line"),
        (22, ""),
    ]
    assert [text for _, text, problem in found if not problem] == ["one", "two\nlines", "\ud83d", "last"]


def test_lines_that_are_not_utf8_spoil_no_others() -> None:
    content = b'{"text": "a"}\n{"text": "\xff"}\n\xff\xfe\n{"text": "b"}\n'
    assert records(content) == [
        (1, "a", ""),
        (2, '{"text": "�"}', "not UTF-8"),
        (3, "��", "not UTF-8"),
        (4, "b", ""),
    ]


def test_the_names_that_are_there() -> None:
    fields: dict[str, None] = {}
    chunk = Chunk("jsonl", 0, b'{"body": 1, "id": 2}\n{"text": "x"}\n{"title": 3}\n', 1, NOWHERE, 0)
    assert len(list(records_of(chunk, "text", Cutting(), fields))) == 3
    assert list(fields) == ["body", "id", "title"]


@given(
    st.lists(
        st.one_of(
            st.text(),
            st.none(),
            st.integers(),
            st.lists(st.integers()),
            st.dictionaries(st.text(), st.text()),
        )
    )
)
def test_one_record_a_line(values: list[Any]) -> None:
    lines = [json.dumps({"text": value}, ensure_ascii=bool(i % 2)) for i, value in enumerate(values)]
    try:
        content = "\n".join(lines).encode()
    except UnicodeEncodeError:
        return
    found = records(content)
    assert [number for number, _, _ in found] == list(range(1, len(values) + 1))
    for (_, text, problem), value in zip(found, values, strict=True):
        assert (text, problem) == (value, "") if isinstance(value, str) else problem == "not text"


def test_a_file_is_a_document() -> None:
    assert records(b" a\n\nb \n", "text") == [(1, " a\n\nb \n", "")]
    assert records(b"a\xff", "text") == [(1, "a�", "not UTF-8")]
    assert records(b"", "text") == [(1, "", "")]


def test_documents_between_separators() -> None:
    content = b"<|e|>\n\nfirst\nstory\n<|e|>\n \nsecond<|e|>  \n<|e|>\xff<|e|>"
    assert records(content, "text", Cutting("<|e|>"), 5) == [
        (7, "first\nstory", ""),
        (11, "second", ""),
        (12, "�", "not UTF-8"),
    ]


def test_documents_between_blank_lines() -> None:
    content = b"\n  \none\ntwo\n \t\r\n\n  three\r\n\r\nfour\n"
    assert records(content, "text", Cutting(blank_lines=True)) == [
        (3, "one\ntwo", ""),
        (7, "  three", ""),
        (9, "four", ""),
    ]


def test_rows() -> None:
    assert records(["a", None, 5, "b"], "rows", number=7) == [
        (7, "a", ""),
        (8, "", "not text"),
        (9, "5", "not text"),
        (10, "b", ""),
    ]
    assert records([b"caf\xc3\xa9", b"caf\xe9"], "rows") == [(1, "café", ""), (2, "caf\ufffd", "not UTF-8")]
    assert records([None, None], "rows", fields=("x",)) == [
        (1, "", "no text field"),
        (2, "", "no text field"),
    ]


def test_a_problem_is_the_only_record() -> None:
    assert records(b"", number=8, problem="damaged") == [(8, "", "damaged")]


@pytest.mark.parametrize(
    ("text", "expected"), [("a", True), ("é🙂", True), ("\ud83d", False), ("é\udc00", False)]
)
def test_unicode(text: str, expected: bool) -> None:
    assert is_unicode(text) is expected
