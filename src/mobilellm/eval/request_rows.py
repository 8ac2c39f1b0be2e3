"""Requests to rows of tokens for a model: what several requests have in common is computed once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from mobilellm.eval.interface import Request


class Question(NamedTuple):
    """The log-likelihoods of `continuation` are those of the row's places `start`, `start` + 1, ..."""

    start: int
    continuation: tuple[int, ...]
    numbers: list[int]
    """Which requests ask this."""


class Row(NamedTuple):
    """Tokens to feed (never the last of a continuation) and what is asked of them."""

    tokens: tuple[int, ...]
    questions: list[Question]


def check(requests: Sequence[Request], context: int, vocabulary: int) -> None:
    """Raises ValueError for the first request that does not keep the contract of `Request`."""
    for request in requests:
        if not request.context or not request.continuation:
            empty = "continuation" if request.context else "context"
            raise ValueError(f"likelihoods: a request has an empty {empty}; both hold at least one token")
        fed = len(request.context) + len(request.continuation) - 1
        if fed > context:
            raise ValueError(
                f"likelihoods: a request feeds {fed} tokens and the model's context is {context}; shorten it"
            )
        for part in request:
            if not 0 <= min(part) <= max(part) < vocabulary:
                wrong = next(token for token in part if not 0 <= token < vocabulary)
                raise ValueError(
                    f"likelihoods: token id {wrong} does not lie in the model's vocabulary of {vocabulary}; "
                    "the tokens were made with another tokenizer"
                )


def rows_of(requests: Sequence[Request]) -> list[Row]:
    """The rows that answer all requests, the longest first.

    Equal requests are one question. A request whose tokens are the beginning of another row's is answered
    there: choices of one token share the row of their context.
    """
    numbers: dict[Request, list[int]] = {}
    for number, request in enumerate(requests):
        numbers.setdefault(request, []).append(number)
    fed = sorted(((request[0] + request[1][:-1], request) for request in numbers), reverse=True)
    rows: list[Row] = []
    for tokens, request in fed:
        # In this order what has `tokens` as its beginning stands right before.
        if not rows or rows[-1].tokens[: len(tokens)] != tokens:
            rows.append(Row(tokens, []))
        question = Question(len(request.context) - 1, request.continuation, numbers[request])
        rows[-1].questions.append(question)
    return sorted(rows, key=lambda row: -len(row.tokens))


def batches_of(rows: Sequence[Row], tokens_at_once: int) -> Iterator[list[Row]]:
    """Neighbouring rows, as many as padded to the first of them hold `tokens_at_once`; at least one."""
    batch: list[Row] = []
    for row in rows:
        if batch and len(batch[0].tokens) * (len(batch) + 1) > tokens_at_once:
            yield batch
            batch = []
        batch.append(row)
    if batch:
        yield batch
