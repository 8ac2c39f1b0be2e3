"""Between a text's logits and its tokens: what a request asks beyond sampling, and what it wants to know."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Mapping, Sequence
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from mobilellm.sampling import Draw, Floats


class Grammar(Protocol):
    """What may be written next: `allowed` (V,); a token that was drawn, or what is taken in its place."""

    def allowed(self, vocabulary: int) -> NDArray[np.bool_]: ...

    def settled(self, token: int) -> int: ...


class TokenChances(NamedTuple):
    """Natural logarithms of probabilities, of the model itself: before temperature, filters and grammar."""

    token: int
    logprob: float
    top: list[tuple[int, float]]


class Drawing:
    """Of one text; handed to the batch as `around`. It notes when the text began and got its first token."""

    def __init__(
        self,
        top_logprobs: int | None = None,
        grammar: Grammar | None = None,
        bias: Mapping[int, float] | None = None,
        presence: float = 0.0,
        frequency: float = 0.0,
    ) -> None:
        """`top_logprobs`: None wants no TokenChances. `presence` and `frequency` are subtracted from the
        logits of tokens this text has already, once and for each time."""
        self.began: float | None = None
        self.first: float | None = None
        self._top, self._grammar, self._bias = top_logprobs, grammar, dict(bias or {})
        self._presence, self._frequency = presence, frequency
        self._counts: dict[int, int] = {}
        self._chances: deque[TokenChances] = deque()
        self._plain = not (
            self._bias or grammar is not None or presence or frequency or top_logprobs is not None
        )

    def __call__(self, draw: Draw) -> Draw:
        self.began = time.perf_counter()

        def drawn(logits: Floats) -> int:
            if self.first is None:
                self.first = time.perf_counter()
            return draw(logits) if self._plain else self._drawn(draw, logits)

        return drawn

    @property
    def tells_chances(self) -> bool:
        return self._top is not None

    def next_chances(self) -> TokenChances | None:
        return self._chances.popleft() if self._chances else None

    def _drawn(self, draw: Draw, logits: Floats) -> int:
        token = draw(self._changed(logits))
        if self._grammar is not None:
            token = self._grammar.settled(token)
        self._counts[token] = self._counts.get(token, 0) + 1
        if self._top is not None:
            self._chances.append(_chances(logits, token, self._top))
        return token

    def _changed(self, logits: Floats) -> Floats:
        if not (self._bias or self._grammar or self._presence or self._frequency):
            return logits
        out = logits.copy()
        for token, bias in self._bias.items():
            out[token] += bias
        if self._presence or self._frequency:
            for token, count in self._counts.items():
                out[token] -= self._presence + self._frequency * count
        if self._grammar is not None:
            out[~self._grammar.allowed(len(out))] = -np.inf
        return out


def _chances(logits: Floats, token: int, top: int) -> TokenChances:
    exact = logits.astype(np.float64)
    logprobs = exact - exact.max()
    logprobs -= np.log(np.exp(logprobs).sum())
    best: Sequence[int] = np.argpartition(-logprobs, top)[:top].tolist() if top else []
    ranked = sorted(((each, float(logprobs[each])) for each in best), key=lambda pair: -pair[1])
    return TokenChances(token, float(logprobs[token]), ranked)
