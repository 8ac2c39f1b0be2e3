"""Matrices as ExecuTorch's XNNPACK holds them, and the rounding of what they are multiplied with.

    int8   a row shares a scale, float32: max|w| / 127, codes -127 … 127
    int4   32 numbers of a row share a scale, bfloat16: max|w| / 7.5, codes -8 … 7 ("8da4w")

Scales are rounded before codes are chosen. XNNPACK takes groups of 32 numbers and multiples of it; 32 divides
every width of the MobileLLM family, 128 and 256 do not. Rows that 32 does not divide are stored as int8.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mobilellm.export.static_model import Stored

GROUP = 32
KINDS = ("int4", "int8", "fp32")


def stored(values: Tensor, kind: str) -> Stored:
    """A float32 matrix (R, C) to the nearest as `kind` has it; int4 becomes int8 where 32 divides no row."""
    if kind == "fp32":
        return Stored(values.contiguous())
    if kind == "int4" and values.shape[1] % GROUP == 0:
        runs, lowest, highest, steps = values.reshape(len(values), -1, GROUP), -8, 7, 7.5
        scales = (runs.abs().amax(-1) / steps).clamp(min=2.0**-23).to(torch.bfloat16).float()
    else:
        runs, lowest, highest = values[:, None], -127, 127
        scales = (runs.abs().amax(-1) / highest).clamp(min=2.0**-23)
    codes = torch.round(runs / scales[..., None]).clamp(lowest, highest).to(torch.int8)
    return Stored(codes.flatten(1), scales, 4 if lowest == -8 else 8)


def restored(matrix: Stored) -> Tensor:
    """The numbers (R, C) that stand for a matrix, float32."""
    if matrix.scales is None:
        return matrix.codes
    runs = matrix.codes.float().view(*matrix.scales.shape, -1)
    return (runs * matrix.scales[..., None]).flatten(1)


def to_8_bits(x: Tensor) -> Tensor:
    """Inputs (…, C) rounded to 8 bits a row, from its least to its greatest number, 0 among them."""
    least = x.amin(-1, keepdim=True).clamp(max=0)
    greatest = x.amax(-1, keepdim=True).clamp(min=0)
    scale = ((greatest - least) / 255).clamp(min=torch.finfo(torch.float32).eps)
    zero = torch.round(-128 - least / scale).clamp(-128, 127)
    return (torch.clamp(torch.round(x / scale) + zero, -128, 127) - zero) * scale
