"""Merges of a byte-pair encoding, and the two other ways to say them: pieces by rank, scores of pieces.

The tokenizers library goes by pairs of pieces, the pair to be joined first before the others. SentencePiece
joins any two neighbours that together are a piece, by the score of what comes out. One says the same as the
other where the pairs are all the ways there are to make the pieces.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from mobilellm.sentencepiece_model import LAYOUT_HEAD

Merge = tuple[str, str]


def merges_of(ranked: Iterable[str], pieces: Iterable[str]) -> list[Merge]:
    """Every way to make each of the `ranked` pieces out of two others, in their order.

    Where the same piece can be made twice SentencePiece joins the leftmost pair first; hence the shorter left
    side first.
    """
    known = frozenset(pieces)
    return [
        (left, right)
        for piece in ranked
        for cut in range(1, len(piece))
        if (right := piece[cut:]) in known and (left := piece[:cut]) in known
    ]


def scores_of(merges: Sequence[Merge], pieces: Sequence[str]) -> tuple[float, ...]:
    """A SentencePiece score for each of the `pieces`, a vocabulary in the Llama layout.

    0 for special and byte pieces; 0, -1, -2, ... for the others by rank, single characters last. Raises
    ValueError if scores cannot say it, because the merges are not all that make a piece.
    """
    ranked = tuple(dict.fromkeys(left + right for left, right in merges))
    if sorted(merges_of(ranked, pieces)) != sorted(merges):
        raise ValueError(
            "this tokenizer leaves out merges that SentencePiece would do; scores cannot say that"
        )
    unmerged = dict.fromkeys(pieces[len(LAYOUT_HEAD) :]).keys() - set(ranked)
    order = (*ranked, *(piece for piece in pieces if piece in unmerged))
    score = {piece: float(-rank) for rank, piece in enumerate(order)}
    return tuple(score.get(piece, 0.0) for piece in pieces)


def check_merges(merges: Sequence[Merge], pieces: Sequence[str]) -> None:
    """Raises ValueError for one that joins, or makes, what is no piece."""
    known = frozenset(pieces)
    for left, right in merges:
        if not {left, right, left + right} <= known:
            raise ValueError(f"the merge of {left!r} and {right!r} is not made of pieces in the vocabulary")
