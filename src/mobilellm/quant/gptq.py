"""GPTQ (Frantar et al. 2022, arXiv 2210.17323): one matrix, rounded column by column.

What is lost at a column is made up for by the columns that are still to come, as far as the inputs go
together: with H = sum of x xᵀ over a calibration text, the error of the product is tr(D H Dᵀ) for weights
that are off by D. R rows (outputs), C columns (inputs).
"""

from __future__ import annotations

import torch
from torch import Tensor

from mobilellm.model.quantized import Matrix
from mobilellm.quant.formats import WeightFormat
from mobilellm.quant.scales import best_scales

_DAMPING = 0.01
"""Of H's mean diagonal, added to the diagonal, as the paper has it."""
_COLUMNS_AT_ONCE = 128


def gptq(
    weight: Tensor,
    hessian: Tensor,
    kind: WeightFormat,
    act_order: bool = True,
    search_scales: bool = True,
) -> Matrix:
    """Quantise float32 (R, C) with H (C, C).

    `act_order` takes the columns with the largest inputs first; scales are then found before anything is made
    up for, and otherwise when a group's turn comes. `search_scales` false keeps round-to-nearest's rule for
    the scales.
    """
    columns = weight.shape[1]
    group = kind.group or columns
    factor = _inverse_factor(hessian)
    order = torch.arange(columns)
    if act_order:
        order = torch.argsort(hessian.diagonal(), descending=True, stable=True)
        factor = _inverse_factor(hessian[order][:, order])
    importance = factor.diagonal().square().reciprocal()
    static = act_order or group > _COLUMNS_AT_ONCE

    def scales_of(part: Tensor, matters: Tensor) -> Tensor:
        return best_scales(part, matters, kind) if search_scales else kind.quantize(part).scales

    scales = torch.empty(len(weight), columns // group, dtype=kind.scale_dtype)
    if static:
        scales = scales_of(weight, importance[torch.argsort(order)])
    values, codes = weight[:, order].clone(), torch.empty(weight.shape, dtype=torch.int8)
    at_once = columns if group > _COLUMNS_AT_ONCE else _COLUMNS_AT_ONCE // group * group
    for start in range(0, columns, at_once):
        end = min(start + at_once, columns)
        errors = torch.empty(len(weight), end - start)
        for column in range(start, end):
            number = int(order[column]) // group
            if not static and column % group == 0:
                run = slice(column, column + group)
                scales[:, number] = scales_of(values[:, run], importance[run])[:, 0]
            scale = scales[:, number]
            code = kind.nearest(values[:, column, None], scale)[:, 0]
            error = (values[:, column] - code.float() * scale.float()) / factor[column, column]
            values[:, column + 1 : end].addr_(error, factor[column, column + 1 : end], alpha=-1)
            codes[:, order[column]] = code
            errors[:, column - start] = error
        values[:, end:].addmm_(errors, factor[start:end, end:], alpha=-1)
    return Matrix(codes, scales, kind.bits)


def _inverse_factor(hessian: Tensor) -> Tensor:
    """Upper triangular U (C, C), Uᵀ U = (H + damping)⁻¹: its rows say how columns make up for another."""
    diagonal = hessian.diagonal()
    # An input that is always zero: its weights do not matter, and any positive number serves.
    dead = diagonal == 0
    mean = float(diagonal.mean()) or 1.0
    damped = hessian.double() + torch.diag(_DAMPING * mean + dead.double() * mean)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped))
    factor: Tensor = torch.linalg.cholesky(inverse, upper=True)
    return factor.float()
