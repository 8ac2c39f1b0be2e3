"""Guesses at what comes next: what followed the last few tokens where they stood before.

Prompt-lookup decoding (Saxena 2023, github.com/apoorvumang/prompt-lookup-decoding): a summary, an answer
about a text or an edit repeats much of its prompt, and guessing costs a look into a table.
"""

from __future__ import annotations

from collections.abc import Sequence

_LENGTHS = (3, 2)
"""Of the runs of tokens that are looked up, the surest first."""


class PromptLookup:
    """Where every run of two and three tokens of a growing sequence stood last."""

    def __init__(self) -> None:
        self._ends: dict[tuple[int, ...], int] = {}
        self._indexed = 0

    def guess(self, tokens: Sequence[int], most: int) -> list[int]:
        """At most `most` tokens that may follow `tokens`, which only grow from call to call."""
        for end in range(self._indexed + 1, len(tokens)):  # the last run of all has no continuation yet
            for length in _LENGTHS:
                if end >= length:
                    self._ends[tuple(tokens[end - length : end])] = end
        self._indexed = max(self._indexed, len(tokens) - 1)
        for length in _LENGTHS:
            found = self._ends.get(tuple(tokens[-length:]))
            if found is not None:
                return list(tokens[found : found + most])
        return []
