"""Training the pieces of a new byte-fallback BPE vocabulary, with the habits of Llama's SentencePiece model.

A piece is a word or a part of one, with at most one space in front; a run of punctuation or symbols; a run of
spaces; or a single digit. Line breaks, tabs and other control characters, and characters too rare to be worth
a piece, stay out: bytes spell them.
"""

from __future__ import annotations

import json
import unicodedata
from collections import Counter
from collections.abc import Iterable

from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers

from mobilellm.sentencepiece_model import LAYOUT_HEAD, SPACE

_BREAK = "\n"  # stands for everything that ends up as bytes
_WORDS = Regex(
    rf"{SPACE}?[\p{{L}}\p{{M}}]+"  # a word
    r"|\p{N}"  # a digit
    rf"|{SPACE}?[^{SPACE}\p{{L}}\p{{M}}\p{{N}}{_BREAK}]+"  # punctuation and symbols
    rf"|{SPACE}+(?={SPACE})"  # spaces, but the last, which goes with what follows it
    rf"|{SPACE}"
)


def train_pieces(
    texts: Iterable[str],
    vocab_size: int,
    character_coverage: float,
    min_frequency: int,
    max_piece_length: int,
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Merged pieces by rank, and single characters by falling frequency: what follows the bytes.

    `vocab_size` counts all pieces. `character_coverage` is the part of the text whose characters get pieces,
    the most frequent first; `min_frequency` how often a pair must be seen to be merged; `max_piece_length`
    in characters. All texts are held in memory. The result depends on the texts alone. Raises ValueError if
    `vocab_size` is too small for the characters, or too large for the text.
    """
    check_training(vocab_size, character_coverage, min_frequency, max_piece_length)
    marked = [_marked(index, text) for index, text in enumerate(texts)]
    counts: Counter[str] = Counter()
    for text in marked:
        counts.update(text)
    characters = _alphabet(counts, character_coverage)
    smallest = len(LAYOUT_HEAD) + len(characters)
    if vocab_size < smallest:
        raise ValueError(
            f"vocab_size = {vocab_size} is too small: the {len(LAYOUT_HEAD)} special and byte pieces and "
            f"{len(characters)} characters need {smallest}; raise it or lower character_coverage"
        )
    ranked = _merged_pieces(
        _without(marked, counts.keys() - set(characters)),
        vocab_size - len(LAYOUT_HEAD),
        min_frequency,
        max_piece_length,
    )
    if smallest + len(ranked) < vocab_size:
        raise ValueError(
            f"vocab_size = {vocab_size} is too large for this text, which gives at most "
            f"{smallest + len(ranked)} pieces; train on more text or lower vocab_size"
        )
    return ranked, characters


def check_training(
    vocab_size: int, character_coverage: float, min_frequency: int, max_piece_length: int
) -> None:
    """Raises ValueError for what no text could be trained with: before a large corpus is read."""
    if vocab_size <= len(LAYOUT_HEAD):
        raise ValueError(
            f"vocab_size = {vocab_size} is too small: {len(LAYOUT_HEAD)} are special and byte pieces alone"
        )
    if not 0 < character_coverage <= 1:
        raise ValueError(
            f"character_coverage = {character_coverage} must be a part of the text, above 0 and at most 1"
        )
    for name, value in (("min_frequency", min_frequency), ("max_piece_length", max_piece_length)):
        if value < 1:
            raise ValueError(f"{name} = {value} must be at least 1")


def _marked(index: int, text: str) -> str:
    if any("\ud800" <= character <= "\udfff" for character in set(text)):
        raise ValueError(f"text {index} has a lone surrogate; it is no Unicode text")
    return SPACE + text.replace(" ", SPACE)


def _alphabet(counts: Counter[str], coverage: float) -> tuple[str, ...]:
    """The most frequent characters that make up `coverage` of the text, control characters apart."""
    usable = {
        character: count for character, count in counts.items() if unicodedata.category(character) != "Cc"
    }
    if not usable.keys() - {SPACE}:
        raise ValueError("there is no text to train on")
    wanted, seen, alphabet = coverage * sum(usable.values()), 0, []
    for character in sorted(usable, key=lambda character: (-usable[character], character)):
        if seen < wanted or character == SPACE:
            alphabet.append(character)
        seen += usable[character]
    return tuple(alphabet)


def _without(texts: list[str], dropped: Iterable[str]) -> list[str]:
    table = {ord(character): _BREAK for character in dropped}
    return [text.translate(table) for text in texts] if table.keys() - {ord(_BREAK)} else texts


def _merged_pieces(texts: list[str], size: int, min_frequency: int, max_piece_length: int) -> tuple[str, ...]:
    """Pieces of two or more characters in the order BPE found them. `size` counts single characters too."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Split(_WORDS, behavior="removed", invert=True)
    trainer = trainers.BpeTrainer(
        vocab_size=size, min_frequency=min_frequency, max_token_length=max_piece_length, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    merges = json.loads(tokenizer.to_str())["model"]["merges"]
    return tuple(dict.fromkeys(left + right for left, right in merges))
