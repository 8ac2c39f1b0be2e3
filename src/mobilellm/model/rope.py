"""Rotary position embedding (Su et al. 2021) in the split-half layout of Llama checkpoints."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Rotation(NamedTuple):
    """Cosines and signed sines of every position, shared by all layers: (B or 1, T, 1, D)."""

    cos: Tensor
    signed_sin: Tensor


def rotation(positions: Tensor, head_dim: int, theta: float, dtype: torch.dtype) -> Rotation:
    """Angles position * theta^(-2i/D) for positions (T,) or (B, T), made in float32 and stored in `dtype`."""
    angle = angles(positions, head_dim, theta)
    cos, sin = angle.cos(), angle.sin()
    shape = (-1, positions.shape[-1], 1, head_dim)
    return Rotation(
        torch.cat((cos, cos), dim=-1).view(shape).to(dtype),
        torch.cat((-sin, sin), dim=-1).view(shape).to(dtype),
    )


def angles(positions: Tensor, head_dim: int, theta: float) -> Tensor:
    """Positions (T,) or (B, T) times the frequencies: (…, T, D / 2) in float32."""
    exponents = torch.arange(0, head_dim, 2, device=positions.device, dtype=torch.float32) / head_dim
    return positions[..., None].float() * (1.0 / theta**exponents)


def rotate(x: Tensor, rope: Rotation) -> Tensor:
    """Rotate queries or keys x (B, T, heads, D).

    The textbook form is x*cos + (-x2, x1)*sin; swapping the halves by `roll` and keeping the sign in the
    table costs one pass less over x.
    """
    return torch.addcmul(x * rope.cos, x.roll(x.shape[-1] // 2, -1), rope.signed_sin)
