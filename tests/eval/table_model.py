"""A language model that needs no network: a fixed table of which id follows which, one id a character."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from mobilellm.completion import Completion
from mobilellm.eval.interface import Likelihood, ModelIdentity, Request

BOS = 0


class TableModel:
    """Ids 1 … 255 are the low bytes of characters; the next id depends on the last one alone."""

    def __init__(self, context: int = 16, adds_bos: bool = True, seed: int = 0) -> None:
        rows = np.random.default_rng(seed).normal(size=(256, 256))
        self.table = rows - np.log(np.exp(rows).sum(axis=1, keepdims=True))  # natural log-likelihoods
        self.adds_bos = adds_bos
        self._context = context
        self.asked: list[Request] = []

    @property
    def identity(self) -> ModelIdentity:
        return ModelIdentity("table", "test", "float64", "cpu", "0" * 64, 256 * 256, 8 * 256 * 256, {})

    @property
    def context(self) -> int:
        return self._context

    @property
    def bos(self) -> int:
        return BOS

    def encode(self, texts: Sequence[str], special: bool = True) -> list[list[int]]:
        front = [BOS] if special and self.adds_bos else []
        return [front + [max(1, ord(character) % 256) for character in text] for text in texts]

    def encode_with_places(self, text: str) -> tuple[list[int], list[int]]:
        return self.encode([text], special=False)[0], list(range(len(text)))

    def log_likelihoods(self, requests: Sequence[Request]) -> Iterator[tuple[int, Likelihood]]:
        for index in reversed(range(len(requests))):  # any order will do
            context, continuation = requests[index]
            self.asked.append(requests[index])
            assert context
            assert continuation
            assert len(context) + len(continuation) - 1 <= self._context
            ids = [*context, *continuation]
            before = ids[len(context) - 1 : -1]
            yield (
                index,
                Likelihood(
                    self.table[before, continuation].astype(np.float32),
                    bool((self.table[before].argmax(axis=1) == continuation).all()),
                ),
            )

    def greedy(
        self, prompts: Sequence[Sequence[int]], stop: Sequence[str], max_tokens: int
    ) -> list[Completion]:
        found = []
        for prompt in prompts:
            last, text = prompt[-1], ""
            for _ in range(max_tokens):
                last = int(self.table[last].argmax())
                text += chr(last)
                if ends := [text.index(each) for each in stop if each in text]:
                    text = text[: min(ends)]
                    break
            found.append(Completion(text, [], "length"))
        return found
