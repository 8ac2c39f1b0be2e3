"""A model that answers at once, and always the same: for tests of what stands around a model."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterator, Sequence

import numpy as np

from mobilellm.completion import Completion
from mobilellm.eval.interface import Likelihood, ModelIdentity, Request

MANY = [Request((number, number // 7), (number % 5, 3)) for number in range(200)]
IDENTITY = ModelIdentity("a model", "mobilellm", "float32", "cpu", "f" * 64, 10, 40, {})


class Oracle:
    """A model whose answers follow from the request, in an order of its own; counts what it was asked."""

    context, bos = 1000, 1

    def __init__(self, identity: ModelIdentity = IDENTITY, seconds: float = 0.0) -> None:
        self.identity, self.seconds, self.asked = identity, seconds, 0

    def encode(self, texts: Sequence[str], special: bool = True) -> list[list[int]]:
        return [[1] * special + [ord(character) for character in text] for text in texts]

    def encode_with_places(self, text: str) -> tuple[list[int], list[int]]:
        return [ord(character) for character in text], list(range(len(text)))

    def log_likelihoods(self, requests: Sequence[Request]) -> Iterator[tuple[int, Likelihood]]:
        if any(not request.context for request in requests):
            raise ValueError("an empty context")
        return self._answers(requests)

    def _answers(self, requests: Sequence[Request]) -> Iterator[tuple[int, Likelihood]]:
        for number in reversed(range(len(requests))):
            time.sleep(self.seconds)
            self.asked += 1
            yield number, answer_to(requests[number])

    def greedy(
        self, prompts: Sequence[Sequence[int]], stop: Sequence[str], max_tokens: int
    ) -> list[Completion]:
        self.asked += len(prompts)
        return [
            Completion(f"after {list(prompt)} é\udcff {stop} {max_tokens}", [*prompt, 2], "eos")
            for prompt in prompts
        ]


def answer_to(request: Request) -> Likelihood:
    digest = hashlib.sha256(repr(request).encode()).digest()
    generator = np.random.default_rng(int.from_bytes(digest[:8], "little"))
    tokens = -generator.exponential(3, len(request.continuation)).astype(np.float32)
    return Likelihood(tokens, bool(digest[9] & 1))


def same(one: Likelihood, other: Likelihood) -> bool:
    return (
        one.tokens.dtype == other.tokens.dtype == np.float32
        and one.tokens.tobytes() == other.tokens.tobytes()
        and one.greedy is other.greedy
    )
