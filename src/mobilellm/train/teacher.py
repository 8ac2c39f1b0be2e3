"""A teacher over rows of tokens: its k likeliest next tokens at every place that counts.

B sequences, T tokens, R places, E hidden_size, V vocab_size, k of top k.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from mobilellm.train.teacher_cache import Row, TopK, ids_dtype

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


class _Sequence(NamedTuple):
    """A document of a row, or all of it, up to the last place that counts."""

    row: int
    start: int
    stop: int


@torch.inference_mode()
def top_k(teacher: Teacher, rows: Sequence[Row], k: int, temperature: float) -> list[TopK]:
    """Of every row; probabilities are of the temperature. Every document of a row stands alone.

    Raises ValueError for rows longer than the teacher's context, for k above its vocabulary, and for logits
    that are no numbers.
    """
    if k > teacher.vocab_size:
        raise ValueError(
            f"distill.top_k = {k} is more than the teacher's vocabulary of {teacher.vocab_size} tokens; "
            "choose a smaller one"
        )
    ids = [np.zeros((int(row.counted.sum()), k), ids_dtype(teacher.vocab_size)) for row in rows]
    logs = [np.zeros((len(each), k + 1), np.float16) for each in ids]
    for batch in _batches(_sequences(rows), teacher):
        length = max(stop - start for _, start, stop in batch)
        tokens = np.zeros((len(batch), length), np.int64)
        counted = np.zeros((len(batch), length), np.bool_)
        for number, (row, start, stop) in enumerate(batch):
            tokens[number, : stop - start] = rows[row].tokens[start:stop]
            counted[number, : stop - start] = rows[row].counted[start:stop]
        places = torch.from_numpy(np.flatnonzero(counted)).to(teacher.device)
        states = teacher.states(torch.from_numpy(tokens).to(teacher.device), places)
        found_ids, found_logs = _likeliest(teacher, states, k, temperature)
        at = 0
        for row, start, stop in batch:
            before, inside = int(rows[row].counted[:start].sum()), int(rows[row].counted[start:stop].sum())
            ids[row][before : before + inside] = found_ids[at : at + inside]
            logs[row][before : before + inside] = found_logs[at : at + inside]
            at += inside
    return [TopK(*pair) for pair in zip(ids, logs, strict=True)]


def _sequences(rows: Sequence[Row]) -> list[_Sequence]:
    """Those with places that count, the longest first: batches are then padded little."""
    found = []
    for number, row in enumerate(rows):
        starts = [0]
        if row.segments is not None:
            starts += (np.flatnonzero(np.diff(row.segments)) + 1).tolist()
        for start, stop in zip(starts, [*starts[1:], len(row.tokens)], strict=True):
            places = np.flatnonzero(row.counted[start:stop])
            if len(places):
                found.append(_Sequence(number, start, start + int(places[-1]) + 1))
    return sorted(found, key=lambda each: each.start - each.stop)


def _batches(sequences: Sequence[_Sequence], teacher: Teacher) -> Iterator[Sequence[_Sequence]]:
    if sequences and (longest := sequences[0].stop - sequences[0].start) > teacher.context:
        raise ValueError(
            f"distill.teacher = {teacher.name}: its context of {teacher.context} tokens is shorter than a "
            f"sequence of {longest}; make batch.sequence_length smaller"
        )
    most = _TOKENS_AT_ONCE.get(teacher.device.type, _TOKENS_AT_ONCE_ELSEWHERE)
    first = 0
    while first < len(sequences):
        count = max(1, most // (sequences[first].stop - sequences[first].start))
        yield sequences[first : first + count]
        first += count


def _likeliest(teacher: Teacher, states: Tensor, k: int, temperature: float) -> tuple[np.ndarray, np.ndarray]:
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
        ids.append(top.indices.to(torch.int32).cpu())
        logs.append((torch.cat([top.values, others], -1) - total).half().cpu())
    return torch.cat(ids).numpy(), torch.cat(logs).numpy()
