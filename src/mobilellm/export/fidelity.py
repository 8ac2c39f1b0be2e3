"""How far an artefact's next-token distributions are from its source's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from mobilellm.export.questions import Answers, Floats, Questions


class Fidelity(NamedTuple):
    """How far next-token distributions are from the source's, over the windows."""

    kl: float
    """Mean KL(source ‖ artefact), nats a token."""
    cost: float
    """The same of the reference arithmetic: what the scheme itself costs."""
    agreement: float
    """Share of tokens where both would say the same next token."""
    perplexity: float
    source_perplexity: float
    origin_kl: float | None = None
    """As `kl`, from what a quantised source was made of; None where that was not at hand."""


def fidelity(
    answers: Answers,
    questions: Questions,
    source: Sequence[Floats],
    reference: Sequence[Floats],
    origin: Sequence[Floats] = (),
) -> Fidelity:
    """From logits (T, V) of each window: of the artefact, of its source, of the reference arithmetic; and, if
    it is at hand, of what a quantised source was made of."""
    theirs, ours = _log_softmax(np.concatenate(answers.logits)), _log_softmax(np.concatenate(source))
    rounded = _log_softmax(np.concatenate(reference))
    return Fidelity(
        kl=_kl(ours, theirs),
        cost=_kl(ours, rounded),
        agreement=float((ours.argmax(1) == theirs.argmax(1)).mean()),
        perplexity=_perplexity(theirs, questions.windows),
        source_perplexity=_perplexity(ours, questions.windows),
        origin_kl=_kl(_log_softmax(np.concatenate(origin)), theirs) if origin else None,
    )


def _log_softmax(logits: Floats) -> Floats:
    shifted = logits - logits.max(axis=1, keepdims=True)
    out: Floats = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    return out


def _kl(first: Floats, second: Floats) -> float:
    """Mean over rows; what rounding leaves below zero is zero."""
    return max(0.0, float((np.exp(first) * (first - second)).sum(axis=1, dtype=np.float64).mean()))


def _perplexity(log_likelihoods: Floats, windows: Sequence[Sequence[int]]) -> float:
    total, count, row = 0.0, 0, 0
    for window in windows:
        rows = np.arange(row, row + len(window) - 1)
        total -= float(log_likelihoods[rows, window[1:]].sum(dtype=np.float64))
        count, row = count + len(rows), row + len(window)
    return float(np.exp(total / count))
