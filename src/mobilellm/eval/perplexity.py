"""Perplexity and bits per byte of a stream of tokens."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from mobilellm.model.transformer import MobileLLM

Stream = Sequence[int] | NDArray[np.integer[Any]]


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
        return math.exp(self.loss) if self.loss < 700 else math.inf

    def bits_per_byte(self, num_bytes: int) -> float:
        """Per UTF-8 byte of the text: comparable between tokenizers. Boundary tokens count as cost."""
        return self.nats / math.log(2) / num_bytes


@torch.inference_mode()
def windowed(model: MobileLLM, stream: Stream, window: int, batch: int = 8) -> Perplexity:
    """Predict every token of the stream but the first exactly once, in windows of `window` targets.

    Window i reads tokens [i*window, (i+1)*window] and predicts all but its first, so that nothing is skipped
    and nothing counted twice; the last window is shorter. Contexts do not reach across windows.
    Raises ValueError for fewer than two tokens.
    """
    if len(stream) < 2:
        raise ValueError(f"perplexity: {len(stream)} tokens predict nothing; give at least 2")
    device = model.head_weight.device
    tokens = torch.as_tensor(np.asarray(stream, dtype=np.int64), device=device)
    nats, count = 0.0, len(tokens) - 1
    whole = count // window
    rows = tokens[: whole * window + 1].unfold(0, window + 1, window) if whole else tokens[:0].view(0, 0)
    for part in (*torch.split(rows, batch), tokens[whole * window :][None]):
        if part.shape[0] and part.shape[1] > 1:
            logits = model.logits(model.hidden(part[:, :-1])).float()
            nats += F.cross_entropy(logits.flatten(0, 1), part[:, 1:].flatten(), reduction="sum").item()
    return Perplexity(nats, count)
