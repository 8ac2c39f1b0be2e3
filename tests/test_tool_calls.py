"""Calls of tools in text: every form that models write, and whatever else they write."""

from __future__ import annotations

import ast
import json
import time
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mobilellm.call_syntax import read_calls, read_literal
from mobilellm.tool_calls import ToolCall, parse_tool_calls

ONE = ToolCall("f", {"a": 1})
TWO = ToolCall("math.g", {"b": "it's", "c": [1.5, {"k": None}]})

NAMES = st.from_regex(r"[A-Za-z_][A-Za-z0-9_]{0,8}(\.[a-z]{1,5})?", fullmatch=True)
TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**20), 10**20) | st.floats(allow_nan=False, allow_infinity=False) | TEXTS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3),
    max_leaves=10,
)  # fmt: skip
JSON_CALLS = st.builds(ToolCall, NAMES, st.dictionaries(TEXTS, VALUES, max_size=4))
KEYWORDS = st.from_regex(r"[a-z_][a-z0-9_]{0,8}", fullmatch=True)
PYTHON_CALLS = st.builds(ToolCall, NAMES, st.dictionaries(KEYWORDS, VALUES, max_size=4))


def as_json(call: ToolCall, key: str = "arguments") -> str:
    return json.dumps({"name": call.name, key: call.arguments}, ensure_ascii=False)


def as_python(call: ToolCall) -> str:
    return f"{call.name}({', '.join(f'{key}={value!r}' for key, value in call.arguments.items())})"


# What is a call


@pytest.mark.parametrize(
    "text",
    [
        f"<tool_call>\n{as_json(ONE)}\n</tool_call>\n<tool_call>\n{as_json(TWO)}\n</tool_call>",
        f"<tool_call>{as_json(ONE)}<tool_call>{as_json(TWO, 'parameters')}",  # cut off, and not closed
        f"<tool_call>[{as_json(ONE)}, {as_json(TWO)}]</tool_call>",
        f"<tool_call>{as_json(ONE)}\n{as_json(TWO)}</tool_call>",
        f"<tool_call>{as_python(ONE)}, {as_python(TWO)}</tool_call>",
        f"[{as_json(ONE)}, {as_json(TWO)}]",
        f"{as_json(ONE)}\n{as_json(TWO)}",
        f"{as_json(ONE)}; {as_json(TWO)}",
        f"```json\n[{as_json(ONE)}, {as_json(TWO)}]\n```",
        f"```\n{as_python(ONE)}\n{as_python(TWO)}\n```",
        f"[{as_python(ONE)}, {as_python(TWO)}]",
        f" {as_python(ONE)} , {as_python(TWO)} ",
        f'{as_json(ONE)[:-1]}}},{{"name": "math.g", "arguments": {json.dumps(json.dumps(TWO.arguments))}}}',
        str([{"name": ONE.name, "arguments": ONE.arguments}, {"name": TWO.name, "arguments": TWO.arguments}]),
        json.dumps([{"type": "function", "function": dict(call._asdict())} for call in (ONE, TWO)]),
    ],
)
def test_two_calls_in_every_form(text: str) -> None:
    assert parse_tool_calls(text) == ("", [ONE, TWO])


@pytest.mark.parametrize(
    ("text", "content"),
    [
        (f"Let me see. <tool_call>{as_json(ONE)}</tool_call> Done.", "Let me see.  Done."),
        (f"Let me see.\n  {as_json(ONE)}\nDone.", "Let me see.\n\nDone."),
        (f"[note]\n{as_json(ONE)}", "[note]"),
        (f"{as_json(ONE)} Done.", "Done."),
        ("[\n" * 7 + as_json(ONE), "[\n" * 6 + "["),
        (f"<tool_call>nothing</tool_call><tool_call>{as_json(ONE)}", "<tool_call>nothing</tool_call>"),
    ],
)
def test_text_around_a_call_is_kept(text: str, content: str) -> None:
    assert parse_tool_calls(text) == (content, [ONE])


def test_a_closing_tag_inside_an_argument_closes_nothing() -> None:
    call = ToolCall("write", {"text": "</tool_call> and <tool_call>"})
    assert parse_tool_calls(f"<tool_call>{as_json(call)}</tool_call>") == ("", [call])


def test_bare_words_and_tuples_as_the_leaderboard_reads_them() -> None:
    (call,) = parse_tool_calls("f(unit=meters, on=true, at=(1, 2), one=(3), many=(4,))")[1]
    assert call.arguments == {"unit": "meters", "on": True, "at": [1, 2], "one": 3, "many": [4]}


@pytest.mark.parametrize(
    "text",
    [
        "", "[\n" * 8 + as_json(ONE), "Hello (world)", "I cannot do that.", "[]", "{}", "42", '{"name": "Bob"}', '{"arguments": {}}',
        'print("x")', "f(1)", "f(a=1, a=2)", "f(a=b(c=1))", "f(a=1", "f(a=1) is what I would call", "f(a=2**9)",
        '{"name": "f", "arguments": [1]}', '{"name": 3, "arguments": {}}', '{"name": "", "arguments": {}}',
        '<tool_call>{"name": "f", "argum', '<tool_call>{"name": "f", "arguments": {"a": NaN}}</tool_call>',
        '{"name": "f", "arguments": {"a": 1e999}}', '{"name": "f", "arguments": {"a": "\\ud800"}}',
        "f(a=1e999)", r"f(a='\ud800')", r"f(a='\U00ffffff')", "f(a={1: 2})", "f(a=:)", "f(a={'b' 1})",
        '{"name": "f", "arguments": ' + '{"a":' * 40 + "1" + "}" * 41,
        '{"name": "f", "arguments": "{"}', '{"name": "f", "arguments": {"a": ' + "9" * 5000 + "}}",
    ],
)  # fmt: skip
def test_what_is_no_call_stays_text(text: str) -> None:
    assert parse_tool_calls(text) == (text.strip(), [])


# Whatever a model writes


@settings(deadline=None)
@given(st.lists(JSON_CALLS, min_size=1, max_size=3), st.sampled_from(["tags", "lines", "array"]))
def test_json_calls_come_back(calls: list[ToolCall], form: str) -> None:
    written = {
        "tags": "\n".join(f"<tool_call>\n{as_json(call)}\n</tool_call>" for call in calls),
        "lines": "\n".join(map(as_json, calls)),
        "array": f"[{', '.join(map(as_json, calls))}]",
    }[form]
    assert parse_tool_calls(written) == ("", calls)


@settings(deadline=None)
@given(st.lists(PYTHON_CALLS, min_size=1, max_size=3), st.booleans())
def test_python_calls_come_back(calls: list[ToolCall], bracketed: bool) -> None:
    written = ", ".join(map(as_python, calls))
    assert parse_tool_calls(f"[{written}]" if bracketed else written) == ("", calls)


@settings(deadline=None)
@given(VALUES)
def test_literals_as_python_reads_them(value: Any) -> None:
    assert read_literal(repr(value)) == ast.literal_eval(repr(value))


@pytest.mark.parametrize("text", ["[1, 2", "word", "1 2", "{1: 2}", "'", "", "-", "--1"])
def test_other_literals_are_refused(text: str) -> None:
    with pytest.raises(ValueError):
        read_literal(text)
    with pytest.raises(ValueError):
        read_calls(text)


PIECES = [
    "<tool_call>", "</tool_call>", '{"name": "f", "arguments": {}}', "f(a=1)", "[", "]", "{", "}", "(", ")", ",",
    '"', "'", "\\", "name", ":", "=", "1", "-", ".", " ", "\n", "```", "\ud800", "é", "\x00",
]  # fmt: skip


@settings(deadline=None)
@given(st.lists(st.sampled_from(PIECES), max_size=30).map("".join) | st.text(max_size=60))
def test_never_raises_and_gives_plain_json(text: str) -> None:
    content, calls = parse_tool_calls(text)
    assert len(content) <= len(text)
    for call in calls:
        assert json.loads(json.dumps(call.arguments, allow_nan=False)) == call.arguments
        assert call.name.strip() == call.name != ""
    if not calls:
        assert content == text.strip()


@pytest.mark.parametrize(
    "piece", [*PIECES, '{"a":', "f(", "a.", "[f(a=1),", "f(a=1),", '<tool_call>["', "\n{"]
)
@pytest.mark.parametrize("before", ["", "f(a=", "<tool_call>", '{"name": "f", "arguments": {"a": "'])
def test_hostile_text_takes_little_time(piece: str, before: str) -> None:
    text = before + piece * (100_000 // len(piece))
    start = time.process_time()
    parse_tool_calls(text)
    assert time.process_time() - start < 10  # a time that grows with the square takes minutes
