"""Next-token cross-entropy of a batch, in one place for every kind of run."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from mobilellm.model.transformer import MobileLLM


def weighted_loss(model: MobileLLM, tokens: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
    """Sum over the batch of weight * negative log-likelihood (nats), in float32.

    A sum, not a mean: the caller divides by the weight of the whole step, so that micro-batches and devices
    with unequal weights count by token (a mean of means would not).
    """
    logits = model.logits(model.hidden(tokens))
    losses = F.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), reduction="none")
    return torch.dot(losses, weights.flatten())
