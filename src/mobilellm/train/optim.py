"""The optimisers, and which weights decay."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mobilellm.model.cpu_kernels import Kernels
from mobilellm.model.products import has_bfloat16
from mobilellm.train.float_muon import FloatMuon
from mobilellm.train.settings import OptimSettings


def build_optimizer(
    model: nn.Module, settings: OptimSettings, kernels: Kernels | None = None
) -> torch.optim.Optimizer:
    """The optimiser that `settings.name` names, over all parameters of the model that are not frozen.

    With `kernels` AdamW is `KernelAdamW`; all of these must then be float32, contiguous and on the CPU.
    """
    if settings.name != "adamw":
        return MuonAndAdamW(model, settings)
    plain = adamw(model, settings)
    return plain if kernels is None else KernelAdamW(plain, kernels)


def adamw(model: nn.Module, settings: OptimSettings) -> torch.optim.AdamW:
    """Fused AdamW (Loshchilov & Hutter 2019). Matrices decay, the embedding too; norms do not.

    These are the groups of the Hugging Face Trainer, with which the published models were trained.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    return _adamw([p for p in parameters if p.ndim >= 2], [p for p in parameters if p.ndim < 2], settings)


class KernelAdamW(torch.optim.AdamW):
    """torch's AdamW to within rounding, clipping in the same pass; gradients bfloat16 or float32.

    cpu_optimizer.c reads weights, moments and gradients once a step and changes no gradient. The state is
    that of torch, under the same names.
    """

    def __init__(self, plain: torch.optim.AdamW, kernels: Kernels) -> None:
        super().__init__(plain.param_groups, fused=True)
        self._kernels, self._clip = kernels, 1.0

    def clip(self, limit: float) -> float:
        """The global norm of the gradients; the next step takes them scaled down to `limit`."""
        total = 0.0
        for gradient in (p.grad for group in self.param_groups for p in group["params"]):
            if gradient is not None:
                part = torch.empty((), dtype=torch.float64)
                self._kernels("sum_of_squares", gradient, _is_float(gradient), part, gradient.numel())
                total += part.item()
        norm = math.sqrt(total) if math.isfinite(total) else total
        self._clip = min(1.0, limit / (norm + 1e-6))  # as torch.nn.utils.clip_grad_norm_
        return norm

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, parameter.grad, group)
        self._clip = 1.0

    def _update(self, parameter: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
        state, lr = self.state[parameter], group["lr"]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32)
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(parameter), torch.zeros_like(parameter)
        state["step"] += 1
        step, (beta1, beta2) = state["step"].item(), group["betas"]
        self._kernels(
            "adamw", parameter, state["exp_avg"], state["exp_avg_sq"], gradient, _is_float(gradient),
            self._clip, 1 - lr * group["weight_decay"], beta1, beta2, lr / (1 - beta1**step),
            1 / math.sqrt(1 - beta2**step), group["eps"], parameter.numel(),
        )  # fmt: skip


def _is_float(gradient: Tensor) -> int:
    assert gradient.dtype in (torch.float32, torch.bfloat16)
    return int(gradient.dtype == torch.float32)


class MuonAndAdamW(torch.optim.Optimizer):
    """Muon (Jordan et al. 2024) for the matrices of the blocks; AdamW for embedding, head and norms.

    Muon's steps are scaled to the size of AdamW's ("match_rms_adamw", Liu et al. 2025), so that one learning
    rate serves both. Outwards it is one optimiser with one state.
    """

    def __init__(self, model: nn.Module, settings: OptimSettings) -> None:
        hidden = [p for name, p in model.named_parameters() if ".layers." in name and p.ndim == 2]
        inside = {id(p) for p in hidden}
        others = [p for p in model.parameters() if id(p) not in inside]
        kind = torch.optim.Muon if _multiplies_in_bfloat16(hidden) else FloatMuon
        muon = kind(
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


def _multiplies_in_bfloat16(parameters: Sequence[Tensor]) -> bool:
    return any(parameter.device.type != "cpu" for parameter in parameters) or has_bfloat16()
