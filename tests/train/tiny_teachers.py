"""A teacher of a fraction of a second."""

from __future__ import annotations

import numpy as np
import torch
from tiny_runs import LS, tiny_model
from torch import Tensor

from mobilellm.train.teacher_cache import CacheIdentity, Passage

IDENTITY = CacheIdentity(
    teacher="f" * 64, tokenizer="t" * 64, vocab_size=LS.vocab_size, top_k=8, temperature=2.0, dtype="float32"
)


class TinyTeacher:
    """The tiny model; counts what it is given."""

    name, fingerprint, dtype = "tiny", IDENTITY.teacher, IDENTITY.dtype
    device, context = torch.device("cpu"), LS.max_position_embeddings

    def __init__(self, vocab_size: int = LS.vocab_size) -> None:
        self.model, self.vocab_size, self.tokens = tiny_model(), vocab_size, 0

    def states(self, tokens: Tensor, places: Tensor) -> Tensor:
        self.tokens += tokens.numel()
        return self.model.hidden(tokens).flatten(0, 1)[places]

    def logits(self, states: Tensor) -> Tensor:
        return self.model.logits(states)


def passages(count: int, seed: int = 0) -> list[Passage]:
    """Random ones, of whose places three of four count."""
    draw = np.random.default_rng(seed)
    out = []
    for length in draw.integers(2, 40, count):
        counted = draw.random(length) < 0.75
        counted[-1] = True
        out.append(Passage(draw.integers(0, LS.vocab_size, length), counted))
    return out
