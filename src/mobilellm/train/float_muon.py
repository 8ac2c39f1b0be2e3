"""Muon with its matrix products in float32, for processors without bfloat16 instructions.

torch.optim.Muon orthogonalises in bfloat16, which such a processor emulates: a step of the quickstart's model
took a second of processor time in that alone (docs/log.md).
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor


class FloatMuon(torch.optim.Muon):
    """torch.optim.Muon's step (Jordan et al. 2024), options and state, computed in float32."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        assert closure is None, "no closure is used here"
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, parameter.grad.float(), group)

    def _update(self, parameter: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
        state = self.state[parameter]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(gradient)
        momentum = state["momentum_buffer"].lerp_(gradient, 1 - group["momentum"])
        wanted = gradient.lerp(momentum, group["momentum"]) if group["nesterov"] else momentum
        direction = orthogonalised(wanted, group["ns_coefficients"], group["ns_steps"], group["eps"])
        assert group["adjust_lr_fn"] == "match_rms_adamw"
        lr = float(group["lr"])
        parameter.mul_(1 - lr * group["weight_decay"])
        parameter.add_(direction, alpha=-lr * 0.2 * math.sqrt(max(parameter.shape)))


def orthogonalised(
    matrix: Tensor, coefficients: tuple[float, float, float], steps: int, eps: float
) -> Tensor:
    """Near U V^T of matrix = U S V^T: `steps` of the quintic Newton-Schulz iteration a X + b X X^T X + c …"""
    a, b, c = coefficients
    tall = matrix.shape[0] > matrix.shape[1]
    x = matrix.T if tall else matrix
    x = x / x.norm().clamp(min=eps)  # the spectral norm is then at most 1
    for _ in range(steps):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    out: Tensor = x.T if tall else x
    return out
