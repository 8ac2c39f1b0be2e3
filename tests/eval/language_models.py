"""LanguageModels for tests: one whose likelihoods are told, one that is transformers' and nothing clever."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch

from mobilellm.completion import Completion
from mobilellm.eval.interface import Likelihood, ModelIdentity, Request

IDENTITY = ModelIdentity("told", "test", "float32", "cpu", "0" * 64, 1, 4, {})


class ToldModel:
    """Every character is a token; `told` gives the log-likelihood of a continuation after a context."""

    bos = 0

    def __init__(
        self, told: Callable[[str, str], float], context: int = 10**6, adds_bos: bool = False
    ) -> None:
        self._told, self.context, self._adds_bos = told, context, adds_bos
        self.identity = IDENTITY
        self.calls: list[list[Request]] = []

    def encode(self, texts: Sequence[str], special: bool = True) -> list[list[int]]:
        first = [self.bos] if special and self._adds_bos else []
        return [first + [ord(character) for character in text] for text in texts]

    def encode_with_places(self, text: str) -> tuple[list[int], list[int]]:
        raise NotImplementedError

    def log_likelihoods(self, requests: Sequence[Request]) -> Iterator[tuple[int, Likelihood]]:
        """Last first."""
        self.calls.append(list(requests))
        for number in reversed(range(len(requests))):
            context, continuation = ("".join(map(chr, ids)) for ids in requests[number])
            each = np.zeros(len(continuation), np.float32)
            each[0] = self._told(context, continuation)
            yield number, Likelihood(each, False)

    def greedy(
        self, prompts: Sequence[Sequence[int]], stop: Sequence[str], max_tokens: int
    ) -> list[Completion]:
        return [
            Completion(f"{''.join(map(chr, prompt))}|{'/'.join(stop)}|{max_tokens}", [], "length")
            for prompt in prompts
        ]


class PlainModel:
    """A transformers model, one request at a time, all logits, log_softmax."""

    def __init__(self, model: Any, tokenizer: Any, context: int) -> None:
        self._model, self._tokenizer, self.context = model.eval(), tokenizer, context
        first = tokenizer.bos_token_id
        self.bos = tokenizer.eos_token_id if first is None else first
        self.identity = IDENTITY

    def encode(self, texts: Sequence[str], special: bool = True) -> list[list[int]]:
        return [self._tokenizer.encode(text, add_special_tokens=special) for text in texts]

    def encode_with_places(self, text: str) -> tuple[list[int], list[int]]:
        raise NotImplementedError

    @torch.no_grad()
    def log_likelihoods(self, requests: Sequence[Request]) -> Iterator[tuple[int, Likelihood]]:
        for number, (context, continuation) in enumerate(requests):
            ids = torch.tensor([[*context, *continuation]])
            logits = self._model(ids[:, :-1]).logits[0, len(context) - 1 :].float()
            wanted = torch.tensor(continuation)
            each = logits.log_softmax(-1).gather(1, wanted[:, None])[:, 0]
            yield number, Likelihood(each.numpy(), bool((logits.argmax(-1) == wanted).all()))

    @torch.no_grad()
    def greedy(
        self, prompts: Sequence[Sequence[int]], stop: Sequence[str], max_tokens: int
    ) -> list[Completion]:
        found = []
        for prompt in prompts:
            ids = list(prompt)
            while len(ids) < len(prompt) + max_tokens:
                ids.append(int(self._model(torch.tensor([ids])).logits[0, -1].argmax()))
                if ids[-1] == self._tokenizer.eos_token_id:
                    break
            text = self._tokenizer.decode(ids[len(prompt) :], skip_special_tokens=True)
            short = min((text.split(end)[0] for end in stop), key=len, default=text)
            found.append(Completion(short, ids[len(prompt) :], "stop" if short != text else "length"))
        return found
