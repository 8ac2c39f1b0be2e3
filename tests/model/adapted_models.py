"""Small models with adapters that are no longer at their beginning."""

from __future__ import annotations

from typing import Any

import torch

from mobilellm.config import ModelConfig
from mobilellm.model.adapters import adapt
from mobilellm.model.transformer import MobileLLM
from mobilellm.presets import preset
from mobilellm.train.lora import TARGETS

SETTINGS: dict[str, Any] = {
    "rank": 4, "alpha": 8.0, "dropout": 0.0, "targets": TARGETS, "dora": False, "rslora": False, "seed": 3,
}  # fmt: skip


def base_model(config: ModelConfig | None = None, seed: int = 0) -> MobileLLM:
    """Weights that attend to something and norms that are not one; two blocks, each run twice."""
    draw = torch.Generator().manual_seed(seed)
    model = MobileLLM(config or preset("test-ls"), draw)
    with torch.no_grad():
        for parameter in model.parameters():
            mean, deviation = (1.0, 0.2) if parameter.ndim == 1 else (0.0, 0.1)
            parameter.normal_(mean, deviation, generator=draw)
    return model.eval()


def adapted_model(config: ModelConfig | None = None, moved: bool = True, **changes: Any) -> MobileLLM:
    """`base_model` with adapters; `moved` as if they had been trained."""
    model = base_model(config)
    adapt(model, **(SETTINGS | changes))
    draw = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if moved and "lora_B" in name:
                parameter.normal_(0.0, 0.1, generator=draw)
            elif moved and "lora_magnitude" in name:
                parameter.mul_(1 + 0.2 * torch.randn(parameter.shape, generator=draw))
    return model


def some_tokens(batch: int = 2, length: int = 19, seed: int = 1) -> torch.Tensor:
    return torch.randint(3, 384, (batch, length), generator=torch.Generator().manual_seed(seed))
