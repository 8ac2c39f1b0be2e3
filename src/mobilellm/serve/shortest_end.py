"""A text that keeps to a grammar comes to its end within its length.

A model that is small or hot opens strings and lists that it never closes, and a document that is cut off is
worth nothing. So near the end of its length every token is tried: if what is left would not do to end the
document after it, a token towards the end is taken in its place. The end is looked for greedily, byte by
byte: close what is open, and of values take the shortest.
"""

from __future__ import annotations

import llguidance
import numpy as np

from mobilellm.sentencepiece_model import SPECIAL_PIECES
from mobilellm.tokenizer import EOS_ID

_LONGEST = 512
"""Tokens of an end that is looked for; one that is not found by then is not kept room for."""
_LEAST_OPENED = 8
"""Tokens that one token may add to what must follow it, where the shortest document is shorter than that."""
_FIRST = [len(SPECIAL_PIECES) + byte for byte in b'}]",0']
_IN_A_STRING = len(SPECIAL_PIECES) + ord("~")
_QUOTE = len(SPECIAL_PIECES) + ord('"')


class ShortestEnd:
    """Of one text. `instead_of` is asked before a token is given to `matcher`."""

    def __init__(self, matcher: llguidance.LLMatcher, tokens: int) -> None:
        self._matcher = matcher
        shortest = _end(matcher.deep_copy(), tokens)
        self._possible = shortest is not None
        self._opened = max(_LEAST_OPENED, len(shortest or ()))
        self._room = tokens - len(shortest or ())  # more is left than that an end would take, at the least
        self._ending: list[int] = []

    def instead_of(self, token: int, left: int) -> int:
        """`token`, or another: the text can be ended with `left` tokens after it, if it could before."""
        if self._ending:
            return self._ending.pop()
        self._room -= 1 + self._opened
        if token == EOS_ID or not self._possible or self._room > 0:
            return token
        ahead = self._matcher.deep_copy()
        ahead.consume_token(token)
        end = _end(ahead, left)
        if end is not None:
            self._room = left - len(end)
            return token
        end = _end(self._matcher.deep_copy(), left + 1)
        if end is None:
            return token
        self._ending = end[::-1]
        return self._ending.pop()


def _end(matcher: llguidance.LLMatcher, most: int) -> list[int] | None:
    """Tokens that end the text, EOS included; None where no more than `most` were found to do it."""
    tokens: list[int] = []
    while len(tokens) < min(most, _LONGEST) and not matcher.is_error():
        next_ones = matcher.compute_ff_tokens() or [
            _towards_the_end(matcher)
        ]  # the first where all is certain
        tokens += next_ones
        if tokens[-1] == EOS_ID:
            return tokens if len(tokens) <= most else None
        matcher.consume_tokens(next_ones)
    return None


def _towards_the_end(matcher: llguidance.LLMatcher) -> int:
    allowed = np.unpackbits(np.frombuffer(matcher.compute_bitmask(), np.uint8), bitorder="little")
    if allowed[EOS_ID]:
        return EOS_ID
    if allowed[_IN_A_STRING] and allowed[_QUOTE]:
        return _QUOTE
    for token in _FIRST:
        if allowed[token]:
            return token
    return int(allowed.argmax())  # the bytes come first
