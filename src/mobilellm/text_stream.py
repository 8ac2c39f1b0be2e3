"""Token by token to text that can be shown: whole characters only, and nothing of a stop string."""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from typing import Protocol


class TokenBytes(Protocol):
    def token_bytes(self, id: int) -> bytes: ...


class TextStream:
    """Turns ids into text as they come.

    All texts from `push` and `finish` together are what decoding all ids at once gives, up to the first stop
    string to be completed (of two completed by the same character, the longer). With `first` the ids begin a
    text, and the space that encoding puts in front of it is dropped; otherwise they continue one.
    """

    def __init__(self, tokenizer: TokenBytes, stop: Sequence[str] = (), first: bool = False) -> None:
        if isinstance(stop, str):
            raise ValueError("stop is a list of strings; give one string as [string]")
        if "" in stop:
            raise ValueError("a stop string is empty; it would stop before the first token")
        self.stopped = False
        self._tokenizer = tokenizer
        self._stop = tuple(stop)
        self._drop_space = first
        self._finished = False
        self._held = ""
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, id: int) -> str:
        """Text that can be shown after the token `id`, often "". There is none once `stopped` is true."""
        if self._finished:
            raise ValueError("this text stream is finished; make a new one for a new text")
        return self._advance(self._decoder.decode(self._tokenizer.token_bytes(id)))

    def finish(self) -> str:
        """What was held back at the end of the ids; an unfinished character becomes U+FFFD."""
        if self._finished:
            return ""
        self._finished = True
        text = self._advance(self._decoder.decode(b"", final=True))
        rest, self._held = self._held, ""
        return text + rest

    def _advance(self, text: str) -> str:
        if self.stopped:
            return ""
        if self._drop_space and text:
            text = text.removeprefix(" ")
            self._drop_space = False
        self._held += text
        shown = self._before_stop()
        if shown is not None:
            self.stopped = True
            self._held = ""
            return shown
        shown_length = len(self._held) - self._length_that_may_stop()
        shown, self._held = self._held[:shown_length], self._held[shown_length:]
        return shown

    def _before_stop(self) -> str | None:
        """The held text before the stop string that ends first in it, None if there is none."""
        found = ((self._held.find(stop), len(stop)) for stop in self._stop)
        ends = [(start + length, start) for start, length in found if start >= 0]
        return self._held[: min(ends)[1]] if ends else None

    def _length_that_may_stop(self) -> int:
        """Length of the longest end of the held text with which a stop string begins."""
        longest = max((len(stop) - 1 for stop in self._stop), default=0)
        for length in range(min(longest, len(self._held)), 0, -1):
            end = self._held[-length:]
            if any(stop.startswith(end) for stop in self._stop):
                return length
        return 0
