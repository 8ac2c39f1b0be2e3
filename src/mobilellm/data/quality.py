"""Quality rules that need no language: symbols and repetition, in the spirit of Gopher's and C4's filters.

Shares and their limits follow Rae et al. 2021 (Gopher), table A1, and Raffel et al. 2020 (C4), where they do
not depend on a language; rules about stop words, word lengths and sentences are left out. Words are what
white space separates, lines what line breaks do.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
from numpy.typing import NDArray

_TOP = {2: "max_top_2_gram", 3: "max_top_3_gram", 4: "max_top_4_gram"}
_BULLETS = ("-", "*", "•", "‣", "◦", "–", "·")
_ELLIPSES = ("...", "…")
_MULTIPLIER = 0x9E3779B97F4A7C15


@dataclass(frozen=True)
class QualityRules:
    """A text that breaks one is rejected by that rule's name. Shares lie in 0 … 1; 1 turns a rule off."""

    min_characters: int = 200
    """Characters a text must have."""
    min_lettered_words: float = 0.8
    """Share of words that hold a letter of any script (Gopher: 0.8)."""
    max_symbols: float = 0.1
    """Number signs and ellipses, for each word (Gopher: 0.1)."""
    max_bullet_lines: float = 0.9
    """Share of lines that begin with a bullet (Gopher: 0.9)."""
    max_ellipsis_lines: float = 0.3
    """Share of lines that end with an ellipsis (Gopher: 0.3)."""
    max_duplicate_lines: float = 0.3
    """Share of lines that came before in the text (Gopher: 0.3)."""
    max_duplicate_line_characters: float = 0.2
    """Share of characters that stand in such lines (Gopher: 0.2)."""
    max_duplicate_paragraphs: float = 0.3
    """Share of paragraphs (between blank lines) that came before (Gopher: 0.3)."""
    max_top_2_gram: float = 0.2
    """Share of characters in the most frequent pair of words (Gopher: 0.2)."""
    max_top_3_gram: float = 0.18
    """The same for three words (Gopher: 0.18)."""
    max_top_4_gram: float = 0.16
    """The same for four words (Gopher: 0.16)."""
    max_duplicate_5_grams: float = 0.15
    """Share of characters in runs of five words that came before (Gopher: 0.15)."""
    max_duplicate_10_grams: float = 0.1
    """The same for ten words (Gopher: 0.1)."""
    reject_lorem_ipsum: bool = True
    """Whether the typesetters' dummy text is rejected (C4)."""

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if field.type == "float" and not 0 <= value <= 1:
                raise ValueError(f"quality: {field.name} = {value} must lie between 0 and 1")
        if self.min_characters < 0:
            raise ValueError(f"quality: min_characters = {self.min_characters} must be 0 or above")


def broken_rule(text: str, rules: QualityRules) -> str:
    """The name of the first rule that `text` breaks, or ""."""
    return next(_broken(text, rules), "")


def _broken(text: str, rules: QualityRules) -> Iterator[str]:
    if len(text) < rules.min_characters:
        yield "min_characters"
    if rules.reject_lorem_ipsum and "lorem ipsum" in text.lower():
        yield "reject_lorem_ipsum"
    words = text.split()
    if not words:
        return
    counts = Counter(words)
    if sum(count for word, count in counts.items() if _has_letter(word)) < rules.min_lettered_words * len(
        words
    ):
        yield "min_lettered_words"
    symbols = text.count("#") + sum(map(text.count, _ELLIPSES))
    if min(symbols, len(words)) > rules.max_symbols * len(words):
        yield "max_symbols"
    lines = [line.strip() for line in text.split("\n")]
    lines = [line for line in lines if line]
    if sum(line.startswith(_BULLETS) for line in lines) > rules.max_bullet_lines * len(lines):
        yield "max_bullet_lines"
    if sum(line.endswith(_ELLIPSES) for line in lines) > rules.max_ellipsis_lines * len(lines):
        yield "max_ellipsis_lines"
    repeated = _repeated(lines)
    if len(repeated) > rules.max_duplicate_lines * len(lines):
        yield "max_duplicate_lines"
    if sum(map(len, repeated)) > rules.max_duplicate_line_characters * sum(map(len, lines)):
        yield "max_duplicate_line_characters"
    paragraphs = [part.strip() for part in text.split("\n\n") if part.strip()]
    if len(_repeated(paragraphs)) > rules.max_duplicate_paragraphs * len(paragraphs):
        yield "max_duplicate_paragraphs"
    yield from _repeating_words(words, list(counts), rules)


def _repeating_words(words: Sequence[str], different: Sequence[str], rules: QualityRules) -> Iterator[str]:
    numbers = {word: number for number, word in enumerate(different)}
    ids = np.fromiter(map(numbers.__getitem__, words), dtype=np.uint64, count=len(words))
    lengths = np.fromiter(map(len, different), dtype=np.int64, count=len(different))[ids]
    characters = int(lengths.sum())
    ends = np.concatenate([[0], np.cumsum(lengths)])
    for size, name in _TOP.items():
        grams = _grams(ids, size)
        if len(grams) > 1:
            _, first, counts = np.unique(grams, return_index=True, return_counts=True)
            inside = np.minimum(counts * (ends[first + size] - ends[first]), characters)  # they may overlap
            if (inside[counts > 1] > getattr(rules, name) * characters).any():
                yield name
    for size in (5, 10):
        name = f"max_duplicate_{size}_grams"
        if _characters_seen_before(ids, lengths, size) > getattr(rules, name) * characters:
            yield name


def _characters_seen_before(ids: NDArray[np.uint64], lengths: NDArray[Any], size: int) -> int:
    """Characters of all words in runs of `size` words of which the same run stood before, each once."""
    grams = _grams(ids, size)
    if len(grams) < 2:
        return 0
    again = np.ones(len(grams), dtype=np.int64)
    again[np.unique(grams, return_index=True)[1]] = 0
    opened = np.concatenate([again, np.zeros(size, dtype=np.int64)])
    opened[size:] -= again
    return int(lengths[np.cumsum(opened)[: len(lengths)] > 0].sum())


def _grams(ids: NDArray[np.uint64], size: int) -> NDArray[np.uint64]:
    """A hash of each run of `size` numbers; all arithmetic modulo 2**64."""
    count = max(0, len(ids) - size + 1)
    total = np.zeros(count, dtype=np.uint64)
    for i in range(size):
        mixed = (ids[i : i + count] + np.uint64(1)) * np.uint64(pow(_MULTIPLIER, i + 1, 2**64))
        total += mixed ^ (mixed >> np.uint64(29))
    return total


def _repeated(parts: Sequence[str]) -> list[str]:
    """Those that came before."""
    return [part for part, count in Counter(parts).items() for _ in range(count - 1)]


def _has_letter(word: str) -> bool:
    return word.isalpha() or any(map(str.isalpha, word))
