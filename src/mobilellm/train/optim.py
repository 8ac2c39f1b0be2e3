"""The optimisers, and which weights decay."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from mobilellm.train.settings import OptimSettings


def build_optimizer(model: nn.Module, settings: OptimSettings) -> torch.optim.Optimizer:
    """The optimiser that `settings.name` names, over all parameters of the model."""
    return adamw(model, settings) if settings.name == "adamw" else MuonAndAdamW(model, settings)


def adamw(model: nn.Module, settings: OptimSettings) -> torch.optim.AdamW:
    """Fused AdamW (Loshchilov & Hutter 2019). Matrices decay, the embedding too; norms do not.

    These are the groups of the Hugging Face Trainer, with which the published models were trained.
    """
    parameters = list(model.parameters())
    return _adamw([p for p in parameters if p.ndim >= 2], [p for p in parameters if p.ndim < 2], settings)


class MuonAndAdamW(torch.optim.Optimizer):
    """Muon (Jordan et al. 2024) for the matrices of the blocks; AdamW for embedding, head and norms.

    Muon's steps are scaled to the size of AdamW's ("match_rms_adamw", Liu et al. 2025), so that one learning
    rate serves both. Outwards it is one optimiser with one state.
    """

    def __init__(self, model: nn.Module, settings: OptimSettings) -> None:
        hidden = [p for name, p in model.named_parameters() if ".layers." in name and p.ndim == 2]
        inside = {id(p) for p in hidden}
        others = [p for p in model.parameters() if id(p) not in inside]
        muon = torch.optim.Muon(
            hidden,
            lr=settings.lr,
            weight_decay=settings.weight_decay,
            adjust_lr_fn="match_rms_adamw",
        )
        rest = _adamw([p for p in others if p.ndim >= 2], [p for p in others if p.ndim < 2], settings)
        super().__init__([*muon.param_groups, *rest.param_groups], {})
        self._parts: tuple[torch.optim.Optimizer, ...] = (muon, rest)
        self._share()

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for part in self._parts:
            part.step()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self._share()

    def _share(self) -> None:
        """Give the parts this optimiser's groups and state, so that there is one of each."""
        muon, rest = self._parts
        count = len(muon.param_groups)
        muon.param_groups, rest.param_groups = self.param_groups[:count], self.param_groups[count:]
        muon.state = rest.state = self.state


def _adamw(decayed: list[Tensor], undecayed: list[Tensor], settings: OptimSettings) -> torch.optim.AdamW:
    return torch.optim.AdamW(
        [
            {"params": decayed, "weight_decay": settings.weight_decay},
            {"params": undecayed, "weight_decay": 0.0},
        ],
        lr=settings.lr,
        betas=(settings.beta1, settings.beta2),
        eps=settings.epsilon,
        fused=True,
    )
