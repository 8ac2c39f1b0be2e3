"""Numbers as a quantised product sees them: rounded to whole numbers of 8 bits, times a scale.

The scale is found anew for every token, from the numbers themselves ("dynamic", "min-max").

Gradients go straight through (Bengio et al. 2013, arXiv 1308.3432): rounding counts as if it were not there.
None is cut off, because nothing is out of range: the scale follows the largest number.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

_LEAST_SCALE = torch.finfo(torch.float32).smallest_normal


@dataclass(frozen=True)
class Rounding:
    """Rounds and multiplies back, so that ordinary arithmetic goes on with what a device would have."""

    name: str
    group: int | None
    """Numbers that share a scale; None: all of the last dimension."""
    symmetric: bool
    """Around zero: -127 … 127 for -max|x| … max|x|. Else -128 … 127 for min(x, 0) … max(x, 0)."""

    def __call__(self, x: Tensor) -> Tensor:
        """x (…, N) with its numbers rounded, in float32 arithmetic, in the dtype of x."""
        if torch.is_grad_enabled() and x.requires_grad:
            function: Any = _StraightThrough.apply
            straight: Tensor = function(x, self)
            return straight
        values = x.float() if self.group is None else x.float().reshape(*x.shape[:-1], -1, self.group)
        rounded = _symmetric(values) if self.symmetric else _asymmetric(values)
        return rounded.reshape(x.shape).to(x.dtype)


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, rounding: Rounding) -> Tensor:
        return rounding(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None


TOKEN = Rounding("token", None, symmetric=True)
"""A scale a token: W8A8 of the MobileLLM paper's Table 15, symmetric as its authors' LLM-QAT (2305.17888)."""
TOKEN_ASYMMETRIC = Rounding("token-asymmetric", None, symmetric=False)
"""The "8da" of 8da4w: what torchao describes and XNNPACK computes."""
BLOCKS = Rounding("blocks", 32, symmetric=True)
"""A scale for 32 numbers: what our runtime's products with Q8_0 and Q4_0 do (runtime/reference.py)."""

ROUNDINGS = {rounding.name: rounding for rounding in (TOKEN, TOKEN_ASYMMETRIC, BLOCKS)}


def _symmetric(x: Tensor) -> Tensor:
    scale = x.abs().amax(-1, keepdim=True) / 127
    inverse = torch.where(scale != 0, 1 / scale, 0)
    return torch.round(x * inverse) * scale


def _asymmetric(x: Tensor) -> Tensor:
    low, high = x.amin(-1, keepdim=True).clamp(max=0), x.amax(-1, keepdim=True).clamp(min=0)
    scale = ((high - low) / 255).clamp(min=_LEAST_SCALE)
    zero = (-128 - torch.round(low / scale)).clamp(-128, 127)
    whole = (torch.round(x * (1 / scale)) + zero).clamp(-128, 127)
    return (whole - zero) * scale
