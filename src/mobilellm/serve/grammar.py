"""Constrained decoding: which tokens may follow, so that a text keeps to a JSON schema. By llguidance.

JSON is written on one line with a space after "," and ":", as Python writes it and models are trained on it:
a small model that may put any white space anywhere puts it everywhere.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import llguidance
import numpy as np
from numpy.typing import NDArray

from mobilellm.serve.errors import ApiError
from mobilellm.serve.protocol import ChatRequest, JsonObjectFormat, JsonSchemaFormat, NamedTool
from mobilellm.serve.shortest_end import ShortestEnd
from mobilellm.tokenizer import BOS_ID, EOS_ID, Tokenizer
from mobilellm.tool_calls import CLOSE, OPEN

_SPECIALS = 3
"""<unk> <s> </s>; only the last may be drawn, where a text may end."""
_OPTIONS: Any = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
_LEXER_STATES, _ITEMS = 50_000, 20_000
"""Of one text at most: some 100 MB, and a second a token. A schema that takes more is refused, or ends it."""


class Grammars:
    """Of one vocabulary, which is laid out as a tree once."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = llguidance.LLTokenizer(llguidance.TokenizerWrapper(_Vocabulary(tokenizer)))

    def of_chat(self, request: ChatRequest, tools: Sequence[dict[str, Any]]) -> Matchers | None:
        """What a request's answer must keep to; None where it is free. Raises ApiError for what cannot be."""
        wanted = request.response_format
        calls = _calls(request, tools)
        if isinstance(wanted, JsonSchemaFormat | JsonObjectFormat):
            if calls is not None:
                raise ApiError(
                    400, "response_format: does not go with calls that are required or strict", None,
                    "response_format",
                )  # fmt: skip
            schema = wanted.json_schema.schema_ if isinstance(wanted, JsonSchemaFormat) else None
            grammar = llguidance.LLMatcher.grammar_from_json_schema(
                json.dumps(schema or {"type": "object"}), overrides=_OPTIONS
            )
            return self._matchers(grammar, "response_format")
        return None if calls is None else self._matchers(calls, "tools")

    def _matchers(self, grammar: str, parameter: str) -> Matchers:
        limits = llguidance.LLParserLimits(
            max_lexer_states=_LEXER_STATES, step_max_items=_ITEMS, verbose_errors=False
        )
        matcher = llguidance.LLMatcher(self._tokenizer, grammar, log_level=0, limits=limits)
        matchers = Matchers(matcher, parameter)
        matchers.check_first_token()
        return matchers


class Matchers:
    """The beginnings of texts that keep to one grammar, which stood in the request's field `parameter`."""

    def __init__(self, matcher: llguidance.LLMatcher, parameter: str) -> None:
        """Raises ApiError for a grammar that cannot be kept to."""
        self._matcher, self._parameter = matcher, parameter
        _check(matcher, parameter)

    def check_first_token(self) -> None:
        """Some grammars turn out to be too complex, or endless, only here. Raises ApiError."""
        ahead = self._matcher.deep_copy()
        ahead.compute_bitmask()
        _check(ahead, self._parameter)

    def begin(self, tokens: int) -> Matcher:
        """For a text of so many tokens at most, its end included."""
        return Matcher(self._matcher.deep_copy(), tokens, self._parameter)


class Matcher:
    """Where one text stands in its grammar, and how much of it may still follow."""

    def __init__(self, matcher: llguidance.LLMatcher, tokens: int, parameter: str) -> None:
        self._matcher, self._left, self._parameter = matcher, tokens, parameter
        self._end = ShortestEnd(matcher, tokens)

    def allowed(self, vocabulary: int) -> NDArray[np.bool_]:
        """Of each token id below `vocabulary`, whether it may follow. Raises ApiError where a schema became
        too complex on the way."""
        bits = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
        _check(self._matcher, self._parameter)
        return np.unpackbits(bits, bitorder="little")[:vocabulary].astype(bool)

    def settled(self, token: int) -> int:
        """The token itself, or where the text could not be ended any more after it, one towards the end."""
        self._left -= 1
        token = self._end.instead_of(token, self._left)
        self._matcher.consume_token(token)
        return token


class _Vocabulary:
    """A tokenizer as llguidance wants it."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.eos_token_id, self.bos_token_id = EOS_ID, BOS_ID
        specials = [piece.encode() for piece in tokenizer.pieces[:_SPECIALS]]
        self.tokens = specials + [tokenizer.token_bytes(id) for id in range(_SPECIALS, tokenizer.vocab_size)]
        self.special_token_ids = list(range(_SPECIALS))
        self._tokenizer = tokenizer

    def __call__(self, text: str | bytes) -> list[int]:
        """Ids of running text, which no space is put in front of: what must follow is drawn as these."""
        text = text if isinstance(text, str) else text.decode()
        return self._tokenizer.encode(f"\0{text}", bos=False)[2:]  # less the space, and the byte behind it


def _check(matcher: llguidance.LLMatcher, parameter: str) -> None:
    if matcher.is_error():
        reason = " ".join(matcher.get_error().split())[:300]
        raise ApiError(400, f"{parameter}: the schema cannot be kept to: {reason}", None, parameter)


def _calls(request: ChatRequest, tools: Sequence[dict[str, Any]]) -> str | None:
    """A grammar of calls where one is required, or may come and is strict."""
    functions = [tool["function"] for tool in tools]
    if isinstance(request.tool_choice, NamedTool):
        name = request.tool_choice.function.name
        functions = [each for each in functions if each["name"] == name]
        if not functions:
            raise ApiError(400, f"tool_choice: there is no tool {name[:100]!r}", None, "tool_choice")
    is_required = request.tool_choice == "required" or isinstance(request.tool_choice, NamedTool)
    if not is_required and not any(each.get("strict") for each in functions):
        return None
    calls = [_schema_of_call(each, is_required) for each in functions]
    lines = [
        f"start: {'call' if is_required else 'TEXT | call'}",
        f'call: "{OPEN}\\n" json "\\n{CLOSE}"',
        f"json: %json {json.dumps({'anyOf': calls, 'x-guidance': _OPTIONS})}",
    ]
    if not is_required:
        lines.append(r"TEXT: /([^<](.|\n)*)?/")
    return llguidance.LLMatcher.grammar_from_lark("\n".join(lines))


def _schema_of_call(function: dict[str, Any], is_required: bool) -> dict[str, Any]:
    """A function that is not strict takes any object, unless it is the one that is asked for."""
    kept_to = is_required or function.get("strict")
    parameters = (function.get("parameters") if kept_to else None) or {"type": "object"}
    return {
        "type": "object",
        "properties": {"name": {"const": function["name"]}, "arguments": parameters},
        "required": ["name", "arguments"],
        "additionalProperties": False,
    }
