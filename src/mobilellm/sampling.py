"""From logits to the next token: numpy only, so that every runtime samples by the same code and seed.

Filters apply in the order of transformers: repetition penalty, temperature, top-k, top-p, min-p.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]
Draw = Callable[[Floats], int]
"""From the logits (V,) of one sequence to its next token id."""


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How to choose the next token. Raises ValueError naming a bad field."""

    temperature: float = 0.0
    """0 is greedy: the other filters then have nothing to choose from (the repetition penalty still acts)."""
    top_k: int = 0
    """Keep the k most likely tokens; 0 keeps all."""
    top_p: float = 1.0
    """Keep the smallest set of most likely tokens with at least this probability (Holtzman et al. 2020)."""
    min_p: float = 0.0
    """Keep tokens at least this fraction as likely as the most likely one (Nguyen et al. 2024)."""
    repetition_penalty: float = 1.0
    """Divide positive and multiply negative logits of tokens seen before (Keskar et al. 2019)."""
    seed: int | None = None
    """None draws a fresh seed."""

    def __post_init__(self) -> None:
        checks = (
            ("temperature", 0 <= self.temperature < math.inf, "0 (greedy) or above, and finite"),
            ("top_k", isinstance(self.top_k, int) and self.top_k >= 0, "a whole number, 0 (off) or above"),
            ("top_p", 0 < self.top_p <= 1, "above 0 and at most 1 (off)"),
            ("min_p", 0 <= self.min_p < 1, "0 (off) or above, below 1"),
            ("repetition_penalty", 0 < self.repetition_penalty < math.inf, "above 0 and finite; 1 is off"),
            (
                "seed",
                self.seed is None or (isinstance(self.seed, int) and self.seed >= 0),
                "a whole number, 0 or above",
            ),
        )
        for name, good, wanted in checks:
            if not good:
                raise ValueError(f"sampling: {name} = {getattr(self, name)} must be {wanted}")


class Sampler:
    """Draws tokens for one sequence; `row` makes the sequences of a batch independent."""

    def __init__(self, sampling: Sampling, history: Sequence[int] = (), row: int = 0) -> None:
        self.sampling = sampling
        self._row, self._seen = row, set(history)

    def __call__(self, logits: Floats) -> int:
        """The next token id for logits (V,); remembers it for the repetition penalty.

        Raises ValueError for logits that hold NaN or whose largest is infinite: nothing follows from them.
        """
        if self.sampling.repetition_penalty != 1.0:
            logits = _penalised(logits, self._seen, self.sampling.repetition_penalty)
        token = int(logits.argmax())  # the first NaN, if there is one
        if not math.isfinite(logits[token]):
            raise ValueError(
                f"the logits hold {logits[token]}: the model's arithmetic overflowed or its weights are "
                "damaged; try dtype float32"
            )
        if self.sampling.temperature > 0:
            token = self._draw(logits)
        self._seen.add(token)
        return token

    @cached_property
    def _random(self) -> np.random.Generator:
        """Made for the first draw: numpy.random takes 7 MB, and greedy decoding draws nothing."""
        seed = self.sampling.seed
        return np.random.Generator(np.random.PCG64(None if seed is None else [seed, self._row]))

    def _draw(self, logits: Floats) -> int:
        ids, probabilities = distribution(logits, self.sampling)
        cumulative = np.cumsum(probabilities)
        index = int(np.searchsorted(cumulative, self._random.random() * cumulative[-1], side="right"))
        if index == len(ids):  # by rounding; the last ones may have no chance at all
            index = int(np.flatnonzero(probabilities)[-1])
        return int(ids[index])


def distribution(logits: Floats, sampling: Sampling) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Token ids that survive the filters and their probabilities, for a temperature above 0.

    Most likely first where a filter is on, else in the order of the ids.
    """
    scaled = logits.astype(np.float64)
    scaled -= scaled.max()  # before the division, so that only what has no chance anyway can overflow
    with np.errstate(over="ignore"):
        weights = np.exp(scaled / sampling.temperature)
    ids = _most_likely(weights, sampling)
    kept = weights[ids]
    if sampling.top_p < 1:
        before = np.cumsum(kept) - kept  # mass of the tokens ahead of each
        total = kept.sum() if sampling.top_k else weights.sum()
        count = max(1, int(np.count_nonzero(before < sampling.top_p * total)))
        ids, kept = ids[:count], kept[:count]
    if sampling.min_p > 0:
        count = max(1, int(np.count_nonzero(kept >= sampling.min_p * kept[0])))
        ids, kept = ids[:count], kept[:count]
    return ids, kept / kept.sum()


def _most_likely(weights: NDArray[np.float64], sampling: Sampling) -> NDArray[np.int64]:
    """Ids sorted from the most likely, enough of them for the filters; sorting all of V is slow."""
    size = len(weights)
    if sampling.top_k:
        return _top(weights, min(sampling.top_k, size))
    if sampling.top_p == 1 and sampling.min_p == 0:
        return np.arange(size)
    count, total = 256, weights.sum()
    while count < size:
        ids = _top(weights, count)
        enough_mass = sampling.top_p == 1 or weights[ids].sum() >= sampling.top_p * total
        enough_ratio = sampling.min_p == 0 or weights[ids[-1]] < sampling.min_p * weights[ids[0]]
        if enough_mass and enough_ratio:
            return ids
        count *= 8
    return _top(weights, size)


def _top(weights: NDArray[np.float64], count: int) -> NDArray[np.int64]:
    if count < len(weights):
        ids = np.argpartition(weights, len(weights) - count)[-count:]
    else:
        ids = np.arange(len(weights))
    return ids[np.argsort(-weights[ids], kind="stable")]


def _penalised(logits: Floats, seen: set[int], penalty: float) -> Floats:
    out = logits.copy()
    ids = np.fromiter(seen, dtype=np.int64, count=len(seen))
    ids = ids[ids < len(logits)]  # an embedding may have rows that no tokenizer knows
    chosen = out[ids]
    out[ids] = np.where(chosen > 0, chosen / penalty, chosen * penalty)
    return out
