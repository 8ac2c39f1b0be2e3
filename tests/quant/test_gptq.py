from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mobilellm.model.quantized import Matrix
from mobilellm.quant import scales
from mobilellm.quant.formats import FORMATS, INT4, INT8, Q4_0, WeightFormat, int4_in_groups
from mobilellm.quant.gptq import gptq
from mobilellm.quant.scales import best_scales

ALL = [*FORMATS.values(), int4_in_groups(64)]
SEEDS = st.integers(0, 2**31)


def drawn(seed: int, rows: int = 24, columns: int = 192, correlated: bool = True) -> tuple[Tensor, Tensor]:
    """(weights (R, C), inputs (300, C)); correlated inputs lie near 12 directions, some columns being large."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator)
    inputs = torch.randn(300, columns, generator=generator)
    if correlated:
        inputs = 0.3 * inputs + torch.randn(300, 12, generator=generator) @ torch.randn(
            12, columns, generator=generator
        )
        inputs[:, ::17] *= 6
    return weight, inputs


def error(weight: Tensor, matrix: Matrix, inputs: Tensor) -> float:
    return float((inputs @ (matrix.values() - weight).T).norm() / (inputs @ weight.T).norm())


@pytest.mark.parametrize("kind", ALL, ids=lambda kind: kind.name)
@pytest.mark.parametrize("act_order", [True, False])
def test_outputs_lose_less_than_by_rounding_to_nearest(kind: WeightFormat, act_order: bool) -> None:
    for seed in range(3):
        weight, inputs = drawn(seed)
        nearest = error(weight, kind.quantize(weight), inputs)
        found = gptq(weight, inputs.T @ inputs, kind, act_order=act_order)
        assert error(weight, found, inputs) < 0.6 * nearest
        assert found.codes.min() >= kind.lowest
        assert found.codes.max() <= kind.highest
        assert (found.bits, found.scales.dtype) == (kind.bits, kind.scale_dtype)
        assert found.scales.shape == (24, 192 // (kind.group or 192))


@pytest.mark.parametrize("kind", [INT8, INT4, int4_in_groups(64)], ids=lambda kind: kind.name)
@settings(deadline=None, max_examples=20)
@given(seed=SEEDS, act_order=st.booleans())
def test_with_nothing_in_common_it_is_rounding_to_nearest(
    kind: WeightFormat, seed: int, act_order: bool
) -> None:
    """A diagonal H: no column can make up for another."""
    weight, inputs = drawn(seed, 6, 64)
    found = gptq(weight, torch.diag(inputs.square().sum(0)), kind, act_order=act_order, search_scales=False)
    nearest = kind.quantize(weight)
    assert torch.equal(found.codes, nearest.codes)
    assert torch.equal(found.scales, nearest.scales)


def test_it_is_the_algorithm_of_the_paper() -> None:
    """Column by column with the inverse of what is left of H: slow, and from the formulas (2) and (3) alone."""
    weight, inputs = drawn(1, 5, 64)
    hessian = inputs.T @ inputs
    damped = hessian.double() + 0.01 * hessian.diagonal().mean().double() * torch.eye(64)
    left, values = torch.linalg.inv(damped), weight.double().clone()
    scales = INT4.quantize(weight).scales  # found again for each group as its turn comes
    codes = torch.empty(5, 64)
    for column in range(64):
        if column % 32 == 0:
            scales[:, column // 32] = INT4.quantize(values[:, column : column + 32].float()).scales[:, 0]
        scale = scales[:, column // 32].double()
        codes[:, column] = torch.clamp(torch.round(values[:, column] / scale), -8, 7)
        lost = (values[:, column] - codes[:, column] * scale) / left[column, column]
        values -= lost[:, None] * left[column]
        left = left - left[:, column, None] * left[column] / left[column, column]
        left[column], left[:, column] = 0, 0
    found = gptq(weight, hessian, INT4, act_order=False, search_scales=False)
    assert torch.equal(found.scales, scales)
    assert (found.codes == codes).float().mean() > 0.99  # ties of float32 and float64 apart


@pytest.mark.parametrize("act_order", [True, False])
def test_rows_and_the_size_of_inputs_do_not_matter(act_order: bool) -> None:
    weight, inputs = drawn(2)
    hessian = inputs.T @ inputs
    whole = gptq(weight, hessian, Q4_0, act_order=act_order)
    some = gptq(weight[5:9], hessian, Q4_0, act_order=act_order)
    assert torch.equal(whole.codes[5:9], some.codes)
    scaled = gptq(weight, 16 * hessian, Q4_0, act_order=act_order)
    assert torch.equal(whole.codes, scaled.codes)
    turned = gptq(-weight, hessian, Q4_0, act_order=act_order)  # scales of either sign
    assert error(-weight, turned, inputs) == pytest.approx(error(weight, whole, inputs), rel=1e-3)


def test_inputs_that_are_always_zero_do_no_harm() -> None:
    weight, inputs = drawn(3)
    inputs[:, 40:80] = 0
    for act_order in (True, False):
        found = gptq(weight, inputs.T @ inputs, INT4, act_order=act_order)
        assert error(weight, found, inputs) < error(weight, INT4.quantize(weight), inputs)
    found = gptq(weight, torch.zeros(192, 192), INT4)
    assert torch.isfinite(found.values()).all()


@pytest.mark.parametrize("kind", ALL, ids=lambda kind: kind.name)
@settings(deadline=None, max_examples=20)
@given(seed=SEEDS)
def test_no_scales_lose_less_than_the_best(kind: WeightFormat, seed: int) -> None:
    """Not those of round-to-nearest, and not others that are searched (rounded to 16 bits on the way)."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(4, 64, generator=generator) * torch.rand(4, 64, generator=generator).exp()
    importance = torch.rand(64, generator=generator) ** 3

    def loss(tried: Tensor) -> Tensor:
        runs = kind.grouped(weight)
        values = kind.nearest(runs, tried).float() * tried.float()[..., None]
        return (importance.view(1, runs.shape[1], -1) * (values - runs).square()).sum(-1)

    best = loss(best_scales(weight, importance, kind))
    nearest = kind.quantize(weight).scales
    assert (best <= loss(nearest) * (1 + 1e-6)).all()
    for share in (0.6, 0.8, 1.05):
        near = kind.stored_scales(share * scales._reaching(kind.grouped(weight), kind))
        assert (best <= loss(near) * (1 + 1e-6)).all()
    assert torch.isfinite(best_scales(torch.zeros(2, 64), importance, kind).float()).all()
