"""Linear maps of one input as a step of training computes them, some with an adapter beside the weight.

A map gives x Wᵀ; with an adapter x Wᵀ + s (x Aᵀ) Bᵀ (LoRA, Hu et al. 2021, arXiv 2106.09685); and with a
magnitude m that times m / ‖W + s B A‖, row by row of W, where the norm counts as a constant (DoRA, Liu et al.
2024, arXiv 2402.09353). What an adapter adds to a step are products with a side of its rank; where W is
frozen, its gradient is not computed. N tokens, E width of x, R rows of all maps together, r rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from mobilellm.model.products import Products
from mobilellm.model.rounding import Rounding


class Adapter(NamedTuple):
    """What goes with the tensors of one adapter: A (r, E), B (rows, r), m (rows,) if it has a magnitude."""

    scaling: float
    dropout: float  # share of x that A does not see
    has_magnitude: bool


class Flow(NamedTuple):
    """Gradients on their way back, for `Projection.gradients`."""

    outputs: Tensor  # (N, R), by x Wᵀ
    low: Tensor | None  # (N, r of all), by x Aᵀ
    magnitudes: tuple[Tensor, ...]


class Projection:
    """Several maps, as if one weight stood above the other.

    Its tensors are the weights, then A, B and m of each adapter in the order of the weights. Activations come
    and go in bfloat16, tensors are float32 or, where frozen, bfloat16.
    """

    def __init__(
        self, products: Products, adapters: Sequence[Adapter | None], rounding: Rounding | None = None
    ) -> None:
        """`rounding` is what the steps round x with before it comes here."""
        self._products, self._adapters, self.rounding = products, tuple(adapters), rounding
        self._adapted = [index for index, adapter in enumerate(adapters) if adapter is not None]
        present = [adapter for adapter in adapters if adapter is not None]
        self._dropout = present[0].dropout if present else 0.0
        assert all(adapter.dropout == self._dropout for adapter in present)
        self._has_magnitudes = any(adapter.has_magnitude for adapter in present)
        assert not (self._has_magnitudes and self._dropout)
        self.count = len(adapters) + sum(2 + adapter.has_magnitude for adapter in present)
        self.num_kept = bool(present) + (self._dropout > 0) + 2 * self._has_magnitudes

    def through(self, x: Tensor, tensors: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
        """The maps of x (N, E): (N, R); and what to keep for the way back."""
        weights, lows, highs, _ = self._parts(tensors)
        y = self._products.through(x, *weights)
        if not self._adapted:
            return y, []
        kept = []
        if self._dropout:  # one mask for all adapters of an input
            kept.append(torch.rand(x.shape) >= self._dropout)
            x = self._dropped(x, kept)
        low = self._products.through(x, *lows)
        rows = torch.split(y, [len(weight) for weight in weights], dim=1)
        for part, high, index in zip(self._low_parts(low, lows), highs, self._adapted, strict=True):
            rows[index].add_(self._products.through(part.mul_(self._scaling(index)), high))
        kept.append(low)
        if self._has_magnitudes:
            scales = self._scales(tensors)
            kept += [scales, y.mul_(scales)]
        return y, kept

    def back(self, dy: Tensor, tensors: Sequence[Tensor], kept: Sequence[Tensor]) -> tuple[Tensor, Flow]:
        """The gradient by x (N, E) from that by the maps, dy (N, R), which may be overwritten."""
        weights, lows, highs, magnitudes = self._parts(tensors)
        dmagnitudes = []
        sizes = [len(weight) for weight in weights]
        if self._has_magnitudes:
            scales, y = kept[-2:]
            sums = torch.split(torch.sum(dy * y, 0, dtype=torch.float32), sizes)
            dmagnitudes = [sums[index] / magnitude for index, magnitude in magnitudes.items()]
            dy.mul_(scales)
        dx = self._products.back(dy, *weights)
        if not self._adapted:
            return dx, Flow(dy, None, ())
        low = dy.new_empty(len(dy), sum(map(len, lows)))
        rows = torch.split(dy, sizes, dim=1)
        for part, high, index in zip(self._low_parts(low, lows), highs, self._adapted, strict=True):
            torch.mul(self._products.back(rows[index], high), self._scaling(index), out=part)
        dx.add_(self._dropped(self._products.back(low, *lows), kept))
        return dx, Flow(dy, low, tuple(dmagnitudes))

    def gradients(
        self,
        flow: Flow,
        x: Tensor,
        tensors: Sequence[Tensor],
        kept: Sequence[Tensor],
        wanted: Sequence[bool],
        dtype: torch.dtype,
    ) -> list[Tensor | None]:
        """Of every tensor, None where it is not `wanted`; weights' in `dtype`, adapters' in float32."""
        weights, lows, _, _ = self._parts(tensors)
        sizes = [len(weight) for weight in weights]
        out: list[Tensor | None] = [None] * len(weights)
        if any(wanted[: len(weights)]):
            out = list(self._products.gradients(flow.outputs, x, sizes, dtype))
        if flow.low is None:
            return out
        x, low = self._dropped(x, kept), kept[1 if self._dropout else 0]
        dlows = self._products.gradients(flow.low, x, [len(part) for part in lows], torch.float32)
        rows, dmagnitudes = torch.split(flow.outputs, sizes, dim=1), iter(flow.magnitudes)
        for dlow, part, index in zip(dlows, self._low_parts(low, lows), self._adapted, strict=True):
            # The narrow one first: the other way round such a product takes twice as long.
            (dhigh,) = self._products.gradients(part, rows[index], [part.shape[1]], torch.float32)
            out += [dlow, dhigh.t()]
            if self._adapter(index).has_magnitude:
                out.append(next(dmagnitudes))
        return out

    def _parts(
        self, tensors: Sequence[Tensor]
    ) -> tuple[list[Tensor], list[Tensor], list[Tensor], dict[int, Tensor]]:
        """Weights, every A, every B, and the magnitudes by the index of their weight."""
        rest = iter(tensors)
        weights = [next(rest) for _ in self._adapters]
        lows, highs, magnitudes = list[Tensor](), list[Tensor](), dict[int, Tensor]()
        for index in self._adapted:
            lows.append(next(rest))
            highs.append(next(rest))
            if self._adapter(index).has_magnitude:
                magnitudes[index] = next(rest)
        return weights, lows, highs, magnitudes

    def _adapter(self, index: int) -> Adapter:
        adapter = self._adapters[index]
        assert adapter is not None
        return adapter

    def _scaling(self, index: int) -> float:
        return self._adapter(index).scaling

    def _low_parts(self, low: Tensor, lows: Sequence[Tensor]) -> tuple[Tensor, ...]:
        return torch.split(low, [len(each) for each in lows], dim=1)

    def _dropped(self, x: Tensor, kept: Sequence[Tensor]) -> Tensor:
        return x * kept[0] / (1 - self._dropout) if self._dropout else x

    def _scales(self, tensors: Sequence[Tensor]) -> Tensor:
        """m / ‖W + s B A‖ of every row (R,), 1 where there is no magnitude."""
        weights, lows, highs, magnitudes = self._parts(tensors)
        scales = [torch.ones(len(weight)) for weight in weights]
        for low, high, index in zip(lows, highs, self._adapted, strict=True):
            if index in magnitudes:
                moved = torch.addmm(weights[index].float(), high, low, alpha=self._scaling(index))
                scales[index] = magnitudes[index] / torch.linalg.vector_norm(moved, dim=1)
        return torch.cat(scales)
