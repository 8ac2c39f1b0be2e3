"""Perplexity and bits per byte of a stream of tokens."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from mobilellm.data.loader import document_segments, inside_documents
from mobilellm.data.shards import Split
from mobilellm.model.transformer import MobileLLM

Stream = Sequence[int] | NDArray[np.integer[Any]] | Split

_LOGITS_AT_ONCE = 2**25
"""Elements of the float32 logits held at a time: 128 MiB, whatever window, batch and vocabulary."""


class Perplexity(NamedTuple):
    """Totals over all predicted tokens; `nats` is the summed negative log-likelihood."""

    nats: float
    tokens: int

    @property
    def loss(self) -> float:
        """Nats a token."""
        return self.nats / self.tokens

    @property
    def perplexity(self) -> float:
        """Per token: comparable only between models with the same tokenizer."""
        return math.inf if self.loss > 700 else math.exp(self.loss)

    def bits_per_byte(self, num_bytes: int) -> float:
        """Per UTF-8 byte of the text: comparable between tokenizers. Predicted boundary tokens are cost."""
        if num_bytes < 1:
            raise ValueError(f"bits per byte: num_bytes = {num_bytes} must be at least 1")
        return self.nats / math.log(2) / num_bytes


@torch.no_grad()
def windowed(
    model: MobileLLM,
    stream: Stream,
    window: int,
    batch: int = 8,
    rank: int = 0,
    world_size: int = 1,
    document_mask: bool = False,
) -> Perplexity:
    """Predict every token of the stream but the first exactly once, in windows of `window` targets.

    Window i reads tokens [i*window, (i+1)*window] and predicts all but its first, so that nothing is skipped
    and nothing counted twice; the last window is shorter. Contexts do not reach across windows. With
    `document_mask`, as in training with it (`data/loader.py`), nor do they reach across documents, and the
    BOS that begins a document is not predicted from the one before. With several ranks each computes its
    share, in as many forward passes as the others: add the results up.
    Raises ValueError for a stream in which nothing is predicted, ids outside the vocabulary, and a window
    that the model's context cannot hold.
    """
    tokens = np.asarray(stream)
    _check(model, tokens, window, batch, document_mask)
    nats, seen, count = 0.0, 0, len(tokens) - 1
    device = model.head_weight.device
    starts = range(0, count, window)
    whole = [start for start in starts if start + window <= count]
    groups = [whole[i : i + batch] for i in range(0, len(whole), batch)]
    groups += [[start] for start in starts[len(whole) :]]
    turns = -(-len(groups) // world_size)
    for turn in range(turns):
        number = turn * world_size + rank
        group = groups[min(number, len(groups) - 1)]
        rows = np.stack([tokens[start : start + window + 1] for start in group]).astype(np.int64)
        part = torch.from_numpy(rows).to(device)
        counted, segments = torch.ones_like(part[:, 1:], dtype=torch.bool), None
        if document_mask:
            segments = torch.from_numpy(document_segments(rows[:, :-1])).to(device)
            counted = torch.from_numpy(inside_documents(rows[:, 1:])).to(device)
        hidden = model.hidden(part[:, :-1], segments=segments)[counted]
        at_once = max(1, _LOGITS_AT_ONCE // model.config.vocab_size)
        targets = torch.split(part[:, 1:][counted], at_once)
        for states, wanted in zip(torch.split(hidden, at_once), targets, strict=True):
            losses = F.cross_entropy(model.logits(states).float(), wanted, reduction="none")
            if number < len(groups):
                nats += losses.double().sum().item()
                seen += len(wanted)
    return Perplexity(nats, seen)


def _check(
    model: MobileLLM, tokens: NDArray[np.integer[Any]], window: int, batch: int, document_mask: bool
) -> None:
    context, vocabulary = model.config.max_position_embeddings, model.config.vocab_size
    if tokens.ndim != 1 or len(tokens) < 2:
        raise ValueError(f"perplexity: {tokens.size} tokens predict nothing; give at least 2 in a row")
    if not np.issubdtype(tokens.dtype, np.integer):
        raise ValueError(f"perplexity: token ids are {tokens.dtype}; they must be whole numbers")
    if not 1 <= window <= context:
        raise ValueError(f"perplexity: window = {window} must lie in 1 … {context}, the model's context")
    if batch < 1:
        raise ValueError(f"perplexity: batch = {batch} must be at least 1")
    if not 0 <= tokens.min() <= tokens.max() < vocabulary:
        raise ValueError(
            f"perplexity: token ids {tokens.min()} … {tokens.max()} do not lie in the vocabulary of "
            f"{vocabulary}; the tokens were made with another tokenizer"
        )
    if document_mask and not inside_documents(tokens[1:]).any():
        raise ValueError(
            f"perplexity: {tokens.size} tokens are all BOS, and a document of nothing else predicts nothing"
        )
