"""The optimiser and which weights decay."""

from __future__ import annotations

import torch
from torch import nn

from mobilellm.train.settings import TrainSettings


def adamw(model: nn.Module, settings: TrainSettings) -> torch.optim.AdamW:
    """Fused AdamW (Loshchilov & Hutter 2019). Matrices decay, the embedding too; norms do not.

    These are the groups of the Hugging Face Trainer, with which the published models were trained.
    """
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    return torch.optim.AdamW(
        [
            {"params": matrices, "weight_decay": settings.weight_decay},
            {"params": vectors, "weight_decay": 0.0},
        ],
        lr=settings.learning_rate,
        betas=(settings.beta1, settings.beta2),
        eps=settings.epsilon,
        fused=True,
    )
