"""How a quantised matrix is stored: bits of a code, how many weights share a scale, and how both are rounded.

    int8      a row shares a scale, float32; codes -127 … 127; scale max|w| / 127        8 bits + 32 a row
    int4      a group of a row (32) shares a scale, bfloat16; codes -8 … 7; max|w| / 7.5  4.5 bits
    q8_0      GGUF: 32 share a scale, float16; codes -127 … 127                           8.5 bits
    q4_0      GGUF: 32 share a scale, float16, of either sign; codes -8 … 7               4.5 bits

int8 never takes the code -128: XNNPACK's kernels add two products in 16 bits. int4 is torchao's symmetric
int4 but for its scales, which are rounded to bfloat16 before the codes are chosen, because XNNPACK keeps them
so: the codes then fit the scales that a device has. q8_0 and q4_0 are llama.cpp's: what `gguf_blocks` does in
numpy, bit for bit, on any device.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from mobilellm.gguf_blocks import BLOCK, join_q4_0, join_q8_0
from mobilellm.model.quantized import Matrix

_LEAST_SCALE = 2.0**-126
"""Of int8 and int4, as torchao's: a group of zeros has a scale above zero, too."""
_WEIGHTS_AT_ONCE = 2**18


@dataclass(frozen=True)
class WeightFormat:
    """One way to store a matrix in whole numbers."""

    name: str
    bits: int
    group: int | None
    """Weights of a row that share a scale; None: the whole row."""
    scale_dtype: torch.dtype
    lowest: int
    highest: int
    steps: float
    """Scales of round-to-nearest are max|w| / steps (q4_0: of the weight itself, so that it becomes -8)."""

    @property
    def in_gguf(self) -> bool:
        return self.name in _BLOCKS

    @property
    def signed_scales(self) -> bool:
        """Whether a scale may be negative."""
        return self.name == "q4_0"

    def fits(self, columns: int) -> bool:
        """Whether rows of so many weights are whole groups."""
        return self.group is None or columns % self.group == 0

    def bits_per_weight(self, columns: int) -> float:
        """Scales included, in rows of `columns` weights."""
        return self.bits + 8 * self.scale_dtype.itemsize / (self.group or columns)

    def nbytes(self, rows: int, columns: int) -> int:
        return rows * (
            columns * self.bits // 8 + columns // (self.group or columns) * self.scale_dtype.itemsize
        )

    def quantize(self, weight: Tensor) -> Matrix:
        """Round-to-nearest of float32 (R, C), on its device: the format's own definition.

        Raises ValueError for rows that are not whole groups, numbers that are not finite or too large.
        """
        if not self.fits(weight.shape[1]):
            raise ValueError(
                f"{self.name}: rows of {weight.shape[1]} weights are no whole groups of {self.group}"
            )
        runs = self.grouped(weight)
        low, high = runs.amin(-1), runs.amax(-1)
        if not bool(torch.isfinite(low).all() & torch.isfinite(high).all()):
            raise ValueError(f"{self.name}: there are weights that are not finite")
        if self.signed_scales:
            scales = _furthest(runs, low, high) / -self.steps
        else:
            scales = torch.maximum(high.abs(), low.abs()) / self.steps
        stored = self.stored_scales(scales)
        codes = _GGML_CODES[self.name](runs, scales) if self.in_gguf else self.nearest(runs, stored)
        return Matrix(codes.flatten(1), stored, self.bits)

    def round_into(self, out: Tensor, weight: Tensor) -> None:
        """`quantize(weight).values()` into `out` (R, C), float32, for quantisation-aware training.

        A few rows at a time, so that what lies between stays in a processor's cache. Raises as `quantize`.
        """
        on_cpu = weight.device.type == "cpu"
        rows = max(1, _WEIGHTS_AT_ONCE // weight.shape[1]) if on_cpu else len(weight)
        for part, values in zip(torch.split(weight, rows), torch.split(out, rows), strict=True):
            values.copy_(self.quantize(part).values())

    def grouped(self, weight: Tensor) -> Tensor:
        """(R, C) as (R, groups, group)."""
        group = self.group or weight.shape[1]
        return weight.view(len(weight), weight.shape[1] // group, group)

    def stored_scales(self, scales: Tensor) -> Tensor:
        """Scales as the file holds them. Raises ValueError for what float16 cannot."""
        if not self.in_gguf:
            return scales.clamp(min=_LEAST_SCALE).to(self.scale_dtype)
        stored = scales.to(self.scale_dtype)
        if not bool(torch.isfinite(stored).all()):
            raise ValueError(f"{self.name}: there are weights too large for scales in float16")
        return stored

    def nearest(self, runs: Tensor, scales: Tensor) -> Tensor:
        """The int8 codes nearest to weights (…, group) under stored scales (…); halves to even."""
        scale = scales.float()[..., None]
        inverse = torch.where(scale != 0, 1 / scale, 0)
        return torch.round(runs * inverse).clamp(self.lowest, self.highest).to(torch.int8)

    def file_bytes(self, matrix: Matrix) -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
        """Of a GGUF format: the rows of the file, uint8 (R, bytes)."""
        codes = matrix.codes.reshape(-1, BLOCK).numpy()
        scales = matrix.scales.float().reshape(-1).numpy()
        return _BLOCKS[self.name](scales, codes).reshape(len(matrix.codes), -1)


def _furthest(runs: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """Of every run the number furthest from zero, its sign kept: of two as far, the first."""
    found = torch.where(high > -low, high, low)
    tied = high == -low
    if bool(tied.any()):
        some = runs[tied]
        found[tied] = some.gather(-1, some.abs().argmax(-1, keepdim=True))[..., 0]
    return found


def _q8_0_codes(runs: Tensor, scales: Tensor) -> Tensor:
    """Halves away from zero, under scales not yet rounded: as `gguf_blocks` and ggml."""
    scaled = runs * _inverse(scales)
    halves = torch.copysign(scaled.new_tensor(0.5), scaled)
    return scaled.add_(halves).trunc_().to(torch.int8)


def _q4_0_codes(runs: Tensor, scales: Tensor) -> Tensor:
    scaled = runs * _inverse(scales)
    return scaled.add_(8.5).trunc_().clamp_(max=15).sub_(8).to(torch.int8)


def _inverse(scales: Tensor) -> Tensor:
    """1 / scale, for runs; 0 for a scale that float16 holds as 0 and whose inverse may be too large."""
    return torch.where(scales.abs() > 1e-30, 1 / scales, 0)[..., None]


_GGML_CODES = {"q8_0": _q8_0_codes, "q4_0": _q4_0_codes}
_BLOCKS: dict[str, Callable[..., np.ndarray]] = {"q8_0": join_q8_0, "q4_0": join_q4_0}

INT8 = WeightFormat("int8", 8, None, torch.float32, -127, 127, 127.0)
INT4 = WeightFormat("int4", 4, 32, torch.bfloat16, -8, 7, 7.5)
Q8_0 = WeightFormat("q8_0", 8, BLOCK, torch.float16, -127, 127, 127.0)
Q4_0 = WeightFormat("q4_0", 4, BLOCK, torch.float16, -8, 7, 8.0)

FORMATS = {each.name: each for each in (INT8, INT4, Q8_0, Q4_0)}


def int4_in_groups(group: int) -> WeightFormat:
    """int4 with a scale for `group` weights; its name says so where that is not 32."""
    return INT4 if group == INT4.group else replace(INT4, name=f"int4-g{group}", group=group)
