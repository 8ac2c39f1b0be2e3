"""The calls of tools in what a model wrote, in the forms that models write them.

<tool_call>{"name": "f", "arguments": {"a": 1}}</tool_call>      any number of them, with text around
{"name": "f", "parameters": {"a": 1}}, or an array of such        as the whole answer, or from a line's start
f(a=1), or [f(a=1), g(b="x")]                                     as the whole answer, or inside the tags

Whatever a model wrote, nothing is raised and the time is linear in the text: what cannot be read as a call
stays where it was, as text.
"""

from __future__ import annotations

import json
import re
from typing import Any, NamedTuple

from mobilellm.call_syntax import MOST_NESTED, read_calls, read_literal

OPEN, CLOSE = "<tool_call>", "</tool_call>"

_MOST_CALLS = 128
"""What is tagged beyond so many calls stays text, as it bounds how often one place is read."""
_MOST_LINES = 8
"""Lines that are tried as the beginning of bare JSON."""
_DECODER = json.JSONDecoder()
_SEPARATORS = re.compile(r"[\s,;]*")
_FENCED = re.compile(r"\s*```[a-z_]*[ \t]*\n(.*?)\n?[ \t]*```\s*", re.DOTALL)
_LINE_OF_JSON = re.compile(r"^[ \t]*(?=[{\[])", re.MULTILINE)


class ToolCall(NamedTuple):
    name: str
    arguments: dict[str, Any]
    """Plain JSON: finite numbers, text that UTF-8 can write, nested 32 deep at most."""


def parse_tool_calls(text: str) -> tuple[str, list[ToolCall]]:
    """(what is left as the answer's text, stripped; the calls in their order). Never raises."""
    if OPEN in text:
        return _tagged(text)
    if calls := _whole(text):
        return "", calls
    return _from_a_line(text)


def _tagged(text: str) -> tuple[str, list[ToolCall]]:
    """An answer that was cut off after a whole call needs no closing tag."""
    kept, calls, place = [], list[ToolCall](), 0
    for _ in range(_MOST_CALLS):
        start = text.find(OPEN, place)
        if start < 0:
            break
        kept.append(text[place:start])
        inside = start + len(OPEN)
        found, end = _json_calls(text, inside, has_name_only=True)
        if not found or not _ends(text, end):
            closing = text.find(CLOSE, inside)
            end = closing if closing >= 0 else len(text)
            found = _whole(text[inside:end])
        if found:
            calls += found
        else:
            kept.append(text[start:end] + text[end : end + len(CLOSE)])
        place = _after_closing(text, end)
    kept.append(text[place:])
    return "".join(kept).strip(), calls


def _ends(text: str, place: int) -> bool:
    """Whether a tagged call may end here."""
    rest = text[place : place + 64].lstrip()
    return not rest or rest.startswith((CLOSE, OPEN))


def _after_closing(text: str, place: int) -> int:
    rest = text[place : place + 64]
    blank = len(rest) - len(rest.lstrip())
    return place + blank + len(CLOSE) if rest.startswith(CLOSE, blank) else place


def _whole(text: str) -> list[ToolCall]:
    """The calls that a text consists of, if it consists of calls."""
    if fenced := _FENCED.fullmatch(text):
        text = fenced[1]
    calls, end = _json_calls(text, 0, has_name_only=False)
    if calls and not text[end:].strip():
        return calls
    try:
        return [_checked(name, arguments) for name, arguments in read_calls(text)]
    except (ValueError, RecursionError):
        pass
    try:  # JSON but for its quotes
        return _calls_in(read_literal(text), has_name_only=False)
    except (ValueError, RecursionError):
        return []


def _from_a_line(text: str) -> tuple[str, list[ToolCall]]:
    for number, found in enumerate(_LINE_OF_JSON.finditer(text)):
        if number == _MOST_LINES:
            break
        calls, end = _json_calls(text, found.end(), has_name_only=False)
        if calls:
            return (text[: found.start()] + text[end:]).strip(), calls
    return text.strip(), []


def _json_calls(text: str, place: int, has_name_only: bool) -> tuple[list[ToolCall], int]:
    """Calls in JSON one after the other from `place` on, and where they end; none if the first is not one."""
    calls, end = list[ToolCall](), place
    while len(calls) < _MOST_CALLS:
        start = _SEPARATORS.match(text, end).end()  # type: ignore[union-attr]  # it matches nothing as well
        if not text.startswith(("{", "["), start):
            break
        try:
            value, after = _DECODER.raw_decode(text, start)
            calls += _calls_in(value, has_name_only)
        except (ValueError, RecursionError):
            break
        end = after
    return calls, end


def _calls_in(value: Any, has_name_only: bool) -> list[ToolCall]:
    """Raises ValueError if `value` is not a call, or an array of them."""
    return [_call(each, has_name_only) for each in (value if isinstance(value, list) else [value])]


def _call(value: Any, has_name_only: bool) -> ToolCall:
    if isinstance(value, dict) and isinstance(value.get("function"), dict):
        value = value["function"]
    if not isinstance(value, dict) or not isinstance(value.get("name"), str):
        raise ValueError("no name")
    arguments = value.get("arguments", value.get("parameters", {} if has_name_only else None))
    if isinstance(arguments, str):  # JSON within JSON, as some interfaces have it
        arguments = json.loads(arguments)
    return _checked(value["name"], arguments)


def _checked(name: str, arguments: Any) -> ToolCall:
    """Raises ValueError for what a client could not be handed as JSON."""
    if not name.strip() or not isinstance(arguments, dict):
        raise ValueError("no name, or no arguments")
    if _depth(arguments) > MOST_NESTED:
        raise ValueError("nested too deeply")
    json.dumps([name, arguments], ensure_ascii=False, allow_nan=False).encode("utf-8")
    return ToolCall(name.strip(), arguments)


def _depth(value: Any) -> int:
    """How deep containers are nested; no recursion, which hostile depth would exhaust."""
    depth, level = 0, [value]
    while level := [each for each in level if isinstance(each, dict | list)]:
        depth += 1
        level = [inner for each in level for inner in (each.values() if isinstance(each, dict) else each)]
    return depth
