"""Matrix products of training on a CPU in bfloat16, as fast as the processor can: three ways, one interface.

Where vectors of bfloat16 are multiplied by pairs (AVX-512 BF16), cpu_pair_products.c, which rounds weights as
it comes to them. With other instructions for bfloat16, torch's own products of rounded weights. Without any,
torch would take up to fifty times as long as in float32; cpu_products.c takes activations in bfloat16 and
weights in float32 as they are. Sums are float32. N tokens; weights are (rows, E).
"""

from __future__ import annotations

import functools
from typing import Protocol

import torch
from torch import Tensor

from mobilellm.model.cpu_kernels import Kernels

FLOATS, PAIRS = "multiply", "multiply_pairs"
"""Functions that multiply float32, and pairs of bfloat16."""


class Products(Protocol):
    """Activations come in and go out in bfloat16; of several weights, as if one stood above the other."""

    def operand(self, weight: Tensor, dtype: torch.dtype) -> Tensor:
        """`weight` for products in `dtype`, as `multiply` takes it fastest."""

    def multiply(self, a: Tensor, b: Tensor, out: Tensor | torch.dtype | None = None) -> Tensor:
        """a (…, M, K) @ b (…, K, N), also transposed; into `out`, or in that dtype, by default a's."""

    def through(self, x: Tensor, *weights: Tensor) -> Tensor:
        """x (N, E) times the weights transposed: (N, rows of all)."""

    def back(self, dy: Tensor, *weights: Tensor) -> Tensor:
        """dy (N, rows of all) times the weights: (N, E)."""

    def gradients(self, dy: Tensor, x: Tensor, rows: list[int], dtype: torch.dtype) -> list[Tensor]:
        """dy (N, all rows) transposed times x (N, E), for weights of so many `rows`, in `dtype`."""


def products(kernels: Kernels) -> Products:
    """Those for this processor."""
    has_tiles: bool = torch.cpu._is_amx_tile_supported()
    if PAIRS in kernels and not has_tiles:  # torch multiplies tiles of bfloat16, several times as fast
        return KernelProducts(kernels, PAIRS)
    return TorchProducts() if has_bfloat16() else KernelProducts(kernels)


@functools.cache
def has_bfloat16() -> bool:
    """Whether oneDNN, which makes torch's products, has bfloat16 ones for this processor."""
    there: bool = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    return bool(there and torch.backends.mkldnn.enabled and torch.ops.mkldnn._is_mkldnn_bf16_supported())


class TorchProducts:
    def operand(self, weight: Tensor, dtype: torch.dtype) -> Tensor:
        return weight.to(dtype)

    def multiply(self, a: Tensor, b: Tensor, out: Tensor | torch.dtype | None = None) -> Tensor:
        if isinstance(out, torch.dtype):
            return (a @ b).to(out)
        return torch.matmul(a, b, out=out)

    def through(self, x: Tensor, *weights: Tensor) -> Tensor:
        return x @ _narrow(weights).t()

    def back(self, dy: Tensor, *weights: Tensor) -> Tensor:
        return dy @ _narrow(weights)

    def gradients(self, dy: Tensor, x: Tensor, rows: list[int], dtype: torch.dtype) -> list[Tensor]:
        return [part.to(dtype) for part in torch.split(dy.t() @ x, rows)]


def _narrow(weights: tuple[Tensor, ...]) -> Tensor:
    """In bfloat16, one above the other."""
    if len(weights) == 1:
        return weights[0].to(torch.bfloat16)
    rows = [len(weight) for weight in weights]
    out = torch.empty(sum(rows), weights[0].shape[1], dtype=torch.bfloat16)
    for part, weight in zip(torch.split(out, rows), weights, strict=True):
        part.copy_(weight)
    return out


class KernelProducts:
    """By `function` of cpu_products.c or cpu_pair_products.c. Weights stay float32 and where they are."""

    def __init__(self, kernels: Kernels, function: str = FLOATS) -> None:
        self.kernels, self.function = kernels, function

    def operand(self, weight: Tensor, dtype: torch.dtype) -> Tensor:
        return weight if weight.dtype in (torch.float32, torch.bfloat16) else weight.to(dtype)

    def multiply(
        self, a: Tensor, b: Tensor, out: Tensor | torch.dtype | None = None, addend: Tensor | None = None
    ) -> Tensor:
        """`addend` (M, N), float32, is added to the sums; it may be `out` itself."""
        *batch, M, K = a.shape
        N = b.shape[-1]
        if not isinstance(out, Tensor):
            out = a.new_empty(*batch, M, N, dtype=out or torch.bfloat16)
        assert batch == [*b.shape[:-2]] == [*out.shape[:-2]]
        assert len(batch) <= 1
        into, into_batch, into_row, into_column, is_float = _matrix(out)
        start, start_row, start_column = (
            (None, 0, 1) if addend is None else (addend.data_ptr(), *addend.stride())
        )
        assert into_column == start_column == 1
        assert addend is None or addend.dtype == torch.float32
        self.kernels(
            self.function, *_matrix(a), *_matrix(b), start, start_row, into, into_batch, into_row, is_float,
            batch[0] if batch else 1, M, N, K,
        )  # fmt: skip
        return out

    def through(self, x: Tensor, *weights: Tensor) -> Tensor:
        rows = [len(weight) for weight in weights]
        out = x.new_empty(len(x), sum(rows))
        for part, weight in zip(torch.split(out, rows, dim=1), weights, strict=True):
            self.multiply(x, weight.t(), part)
        return out

    def back(self, dy: Tensor, *weights: Tensor) -> Tensor:
        out = dy.new_empty(len(dy), weights[0].shape[1])
        sums = out.new_empty(out.shape, dtype=torch.float32) if len(weights) > 1 else None
        parts = torch.split(dy, [len(weight) for weight in weights], dim=1)
        for number, (part, weight) in enumerate(zip(parts, weights, strict=True), 1):
            into = out if sums is None or number == len(weights) else sums
            self.multiply(part, weight, into, sums if number > 1 else None)
        return out

    def gradients(self, dy: Tensor, x: Tensor, rows: list[int], dtype: torch.dtype) -> list[Tensor]:
        return [self.multiply(part.t(), x, dtype) for part in torch.split(dy, rows, dim=1)]


_IS_FLOAT = {torch.float32: 1, torch.bfloat16: 0}


def _matrix(x: Tensor) -> tuple[int, int, int, int, int]:
    """Address, distances of matrices, rows and columns, whether it is float32; of one matrix or a batch."""
    *batch, row, column = x.stride()
    return x.data_ptr(), batch[0] if batch else 0, row, column, _IS_FLOAT[x.dtype]
