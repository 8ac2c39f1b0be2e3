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

CHUNK_LOGITS = 2**22
"""Logits held at a time."""
_TOKENS_AT_ONCE = {"cpu": 2048}
_TOKENS_AT_ONCE_ELSEWHERE = 16384


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


@torch.inference_mode()
def top_k(teacher: Teacher, passages: Sequence[Passage], k: int, temperature: float) -> list[TopK]:
    """Of every passage; probabilities are of the temperature.

    Raises ValueError for passages longer than the teacher's context, for k above its vocabulary, and for
    logits that are no numbers.
    """
    if k > teacher.vocab_size:
        raise ValueError(
            f"distill.top_k = {k} is more than the teacher's vocabulary of {teacher.vocab_size} tokens; "
            "choose a smaller one"
        )
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
    if order and (longest := len(passages[order[0]].tokens)) > teacher.context:
        raise ValueError(
            f"distill.teacher = {teacher.name}: its context of {teacher.context} tokens is shorter than a "
            f"sequence of {longest}; make batch.sequence_length {teacher.context} or less"
        )
    most = _TOKENS_AT_ONCE.get(teacher.device.type, _TOKENS_AT_ONCE_ELSEWHERE)
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
