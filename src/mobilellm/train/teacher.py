"""A teacher over passages: its k likeliest next tokens at every place that counts.

B sequences, T tokens, R places, E hidden_size, V vocab_size, k of top k.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mobilellm.train.teacher_cache import Passage, TopK, ids_dtype
from mobilellm.train.teacher_cost import CHUNK_LOGITS, TOKENS_AT_ONCE, TOKENS_AT_ONCE_ELSEWHERE


class Teacher(Protocol):
    """A causal language model, whatever runs it."""

    name: str
    fingerprint: str
    """SHA-256 over weights, configuration and tokenizer."""
    dtype: str
    device: torch.device
    context: int
    """Most tokens of a sequence."""
    vocab_size: int
    """Tokens of its tokenizer; logits beyond stand for nothing, and are left out."""

    def states(self, tokens: Tensor, places: Tensor) -> Tensor:
        """Final states (R, E) of `places` (R,), counted through the rows of tokens (B, T).

        Rows are padded on the right, and no place is padding.
        """

    def logits(self, states: Tensor) -> Tensor:
        """Logits (R, at least vocab_size) of states (R, E)."""


def check_top_k(k: int, vocab_size: int) -> None:
    """Raise ValueError for k above the teacher's vocabulary."""
    if k > vocab_size:
        raise ValueError(
            f"distill.top_k = {k} is more than the teacher's vocabulary of {vocab_size} tokens; choose a "
            "smaller one"
        )


def check_context(name: str, context: int, longest: int) -> None:
    """Raise ValueError where a passage of `longest` tokens is more than a teacher takes."""
    if longest > context:
        raise ValueError(
            f"distill.teacher = {name}: its context of {context} tokens is shorter than a sequence of "
            f"{longest}; make batch.sequence_length {context} or less"
        )


@torch.inference_mode()
def top_k(teacher: Teacher, passages: Sequence[Passage], k: int, temperature: float) -> list[TopK]:
    """Of every passage; probabilities are of the temperature.

    Raises ValueError for passages longer than the teacher's context, for k above its vocabulary, and for
    logits that are no numbers.
    """
    check_top_k(k, teacher.vocab_size)
    found = dict[int, TopK]()
    for batch in _batches(passages, teacher):
        shape = (len(batch), max(len(passages[number].tokens) for number in batch))
        tokens, counted = np.zeros(shape, np.int64), np.zeros(shape, np.bool_)
        for place, number in enumerate(batch):
            length = len(passages[number].tokens)
            tokens[place, :length], counted[place, :length] = passages[number]
        places = torch.from_numpy(np.flatnonzero(counted)).to(teacher.device)
        states = teacher.states(torch.from_numpy(tokens).to(teacher.device), places)
        ids, logs = _likeliest(teacher, states, k, temperature)
        ends = counted.sum(1).cumsum()[:-1]
        for number, *parts in zip(batch, np.split(ids, ends), np.split(logs, ends), strict=True):
            found[number] = TopK(*parts)
    return [found[number] for number in range(len(passages))]


def _batches(passages: Sequence[Passage], teacher: Teacher) -> Iterator[list[int]]:
    """Numbers of passages, the longest first: batches are then padded little."""
    order = sorted(range(len(passages)), key=lambda number: -len(passages[number].tokens))
    if order:
        check_context(teacher.name, teacher.context, len(passages[order[0]].tokens))
    most = TOKENS_AT_ONCE.get(teacher.device.type, TOKENS_AT_ONCE_ELSEWHERE)
    first = 0
    while first < len(order):
        count = max(1, most // len(passages[order[first]].tokens))
        yield order[first : first + count]
        first += count


def _likeliest(
    teacher: Teacher, states: Tensor, k: int, temperature: float
) -> tuple[NDArray[np.integer[Any]], NDArray[np.float16]]:
    """Ids (R, k) and logarithms (R, k + 1) of the places that `states` are of."""
    ids, logs = list[Tensor](), list[Tensor]()
    for some in torch.split(states, max(1, CHUNK_LOGITS // teacher.vocab_size)):
        logits = teacher.logits(some)[:, : teacher.vocab_size].float() / temperature
        total = logits.logsumexp(-1, keepdim=True)
        if not total.isfinite().all():
            raise ValueError(
                f"distill.teacher = {teacher.name}: gives logits that are no numbers (NaN or infinite) in "
                f"{teacher.dtype}; try distill.dtype = float32, or another teacher"
            )
        top = logits.topk(k)
        others = logits.scatter_(-1, top.indices, -torch.inf).logsumexp(-1, keepdim=True)
        ids.append(top.indices.cpu())
        logs.append((torch.cat([top.values, others], -1) - total).half().cpu())
    narrow = ids_dtype(teacher.vocab_size)
    return torch.cat(ids).numpy().astype(narrow), torch.cat(logs).numpy()
