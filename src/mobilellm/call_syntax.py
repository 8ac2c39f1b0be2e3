"""Values and calls as Python writes them, `f(a=1, b="x")`, read without running anything.

What a model wrote is read here, so nothing is trusted: one pass over the text, nesting bounded, no `eval` and
no compiler (whose time and stack grow with hostile input). A call has keyword arguments only, since tools
have named parameters; their values are literals. A bare word is read as a string, as the Berkeley
Function-Calling Leaderboard reads it, except True, False and None, which JSON's spelling may name as well.
Tuples become lists: tool arguments are JSON.
"""

from __future__ import annotations

import re
from typing import Any, NamedTuple

MOST_NESTED = 32

_TOKEN = re.compile(
    r"""\s*(?:
      (?P<string>"(?:[^"\\\n]|\\.)*"|'(?:[^'\\\n]|\\.)*')
    | (?P<number>[-+]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][-+]?[0-9]+)?)
    | (?P<word>[^\W\d]\w*(?:\.[^\W\d]\w*)*)
    | (?P<mark>[()\[\]{},:;=])
    )""",
    re.VERBOSE | re.DOTALL,
)
_ESCAPE = re.compile(r"\\(?:x([0-9a-fA-F]{2})|u([0-9a-fA-F]{4})|U([0-9a-fA-F]{8})|(.))", re.DOTALL)
_ESCAPED = {"n": "\n", "t": "\t", "r": "\r", "b": "\b", "f": "\f", "\n": "", "\\": "\\", "'": "'", '"': '"'}
_WORDS = {"True": True, "False": False, "None": None, "true": True, "false": False, "null": None}
_REST_IS_BLANK = re.compile(r"\s*\Z")
_CLOSING = {"[": "]", "(": ")", "{": "}"}


def read_calls(text: str) -> list[tuple[str, dict[str, Any]]]:
    """(name, arguments) of every call in `f(…)`, `f(…), g(…)` or `[f(…), g(…)]`, and nothing beside them.

    Raises ValueError for anything else.
    """
    reader = _Reader(text)
    bracketed = reader.skip("[")
    calls = []
    while not (bracketed and reader.skip("]")):
        calls.append(reader.call())
        if not reader.skip(",") and not reader.skip(";") and bracketed:
            reader.expect("]")
            break
        if not bracketed and reader.at_end():
            break
    if not reader.at_end():
        raise ValueError("something follows the calls")
    return calls


def read_literal(text: str) -> Any:
    """The value of one literal: a string, number, list, tuple or dict. Raises ValueError for all else."""
    reader = _Reader(text)
    value = reader.value(has_words=False)
    if not reader.at_end():
        raise ValueError("something follows the literal")
    return value


class _Token(NamedTuple):
    kind: str
    text: str
    end: int


class _Reader:
    def __init__(self, text: str) -> None:
        self._text, self._place = text, 0

    def call(self) -> tuple[str, dict[str, Any]]:
        name = self._take("word").text
        self.expect("(")
        arguments: dict[str, Any] = {}
        while not self.skip(")"):
            key = self._take("word").text
            self.expect("=")
            if key in arguments:
                raise ValueError(f"{key} is given twice")
            arguments[key] = self.value()
            if not self.skip(","):
                self.expect(")")
                break
        return name, arguments

    def value(self, nested: int = 0, has_words: bool = True) -> Any:
        """`has_words` lets a bare word be a string."""
        if nested > MOST_NESTED:
            raise ValueError("nested too deeply")
        token = self._take()
        if token.kind == "string":
            return _ESCAPE.sub(_unescaped, token.text[1:-1])
        if token.kind == "number":
            return float(token.text) if re.search("[.eE]", token.text) else int(token.text)
        if token.kind == "word" and (has_words or token.text in _WORDS):
            return _WORDS.get(token.text, token.text)
        if token.text == "{":
            return self._dict(nested + 1, has_words)
        if token.text in ("[", "("):
            return self._items(_CLOSING[token.text], nested + 1, has_words)
        raise ValueError(f"{token.text!r} begins no value")

    def _items(self, closing: str, nested: int, has_words: bool) -> Any:
        items = []
        while not self.skip(closing):
            items.append(self.value(nested, has_words))
            if not self.skip(","):
                self.expect(closing)
                if closing == ")" and len(items) == 1:  # brackets around a value, no tuple
                    return items[0]
                break
        return items

    def _dict(self, nested: int, has_words: bool) -> dict[str, Any]:
        held: dict[str, Any] = {}
        while not self.skip("}"):
            key = self.value(nested, has_words)
            if not isinstance(key, str):
                raise ValueError(f"{key!r} is no name of a field")
            self.expect(":")
            held[key] = self.value(nested, has_words)
            if not self.skip(","):
                self.expect("}")
                break
        return held

    def at_end(self) -> bool:
        return _REST_IS_BLANK.match(self._text, self._place) is not None

    def skip(self, mark: str) -> bool:
        """Whether the next token is this mark, which is then behind us."""
        token = self._peek()
        if token is None or token.kind != "mark" or token.text != mark:
            return False
        self._place = token.end
        return True

    def expect(self, mark: str) -> None:
        if not self.skip(mark):
            raise ValueError(f"{mark!r} is missing")

    def _take(self, kind: str | None = None) -> _Token:
        token = self._peek()
        if token is None or kind not in (None, token.kind):
            raise ValueError(f"no {kind or 'value'} where one is due")
        self._place = token.end
        return token

    def _peek(self) -> _Token | None:
        found = _TOKEN.match(self._text, self._place)
        return found and _Token(str(found.lastgroup), found[str(found.lastgroup)], found.end())


def _unescaped(found: re.Match[str]) -> str:
    if code := found[1] or found[2] or found[3]:
        return chr(int(code, 16))  # ValueError beyond Unicode
    return _ESCAPED.get(found[4], found[0])
