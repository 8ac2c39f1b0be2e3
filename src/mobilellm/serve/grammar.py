"""Constrained decoding: which tokens may follow, so that a text keeps to a JSON schema. By llguidance."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any

import llguidance
import numpy as np
from numpy.typing import NDArray

from mobilellm.serve.errors import ApiError
from mobilellm.serve.protocol import ChatRequest, JsonObjectFormat, JsonSchemaFormat
from mobilellm.tokenizer import BOS_ID, EOS_ID, Tokenizer

_SPECIAL = 3
"""<unk> <s> </s>; only the last may be drawn, where a text may end."""


class Grammars:
    """Of one vocabulary, which is laid out as a tree once."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = llguidance.LLTokenizer(llguidance.TokenizerWrapper(_Vocabulary(tokenizer)))

    def of_chat(self, request: ChatRequest, tools: Sequence[dict[str, Any]]) -> Callable[[], Matcher] | None:
        """What a request's answer must keep to, to be begun once a choice; None where it is free."""
        required = request.tool_choice not in (None, "auto", "none")
        wanted = request.response_format
        if isinstance(wanted, JsonSchemaFormat):
            schema: Any = wanted.json_schema.schema_
            schema = {"type": "object"} if schema is None else schema
        elif isinstance(wanted, JsonObjectFormat):
            schema = {"type": "object"}
        else:
            return None
        if required:
            raise ApiError(400, "response_format: does not go with a tool_choice that wants a call", None,
                           "response_format")  # fmt: skip
        return self._checked(json.dumps(schema), "response_format")

    def _checked(self, schema: str, parameter: str) -> Callable[[], Matcher]:
        grammar = llguidance.LLMatcher.grammar_from_json_schema(schema)
        matcher = llguidance.LLMatcher(self._tokenizer, grammar, log_level=0)
        if matcher.is_error():
            reason = " ".join(matcher.get_error().split())[:300]
            raise ApiError(400, f"{parameter}: the schema cannot be kept to: {reason}", None, parameter)
        return lambda: Matcher(matcher.deep_copy())


class Matcher:
    """Where one text stands in its grammar."""

    def __init__(self, matcher: llguidance.LLMatcher) -> None:
        self._matcher = matcher

    def allowed(self, vocabulary: int) -> NDArray[np.bool_]:
        bits = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
        if self._matcher.is_error():
            raise ValueError(f"the schema became too complex: {self._matcher.get_error()[:300]}")
        return np.unpackbits(bits, bitorder="little")[:vocabulary].astype(bool)

    def take(self, token: int) -> None:
        self._matcher.consume_token(token)


class _Vocabulary:
    """A tokenizer as llguidance wants it. Its encoding serves for hints alone, which are not used."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.eos_token_id, self.bos_token_id = EOS_ID, BOS_ID
        specials = [piece.encode() for piece in tokenizer.pieces[:_SPECIAL]]
        self.tokens = specials + [tokenizer.token_bytes(id) for id in range(_SPECIAL, tokenizer.vocab_size)]
        self.special_token_ids = list(range(_SPECIAL))
        self._tokenizer = tokenizer

    def __call__(self, text: str | bytes) -> list[int]:
        return self._tokenizer.encode(text if isinstance(text, str) else text.decode(), bos=False)
