"""The three ways of making products, against float64; they are interchangeable."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mobilellm.model import cpu_kernels
from mobilellm.model.cpu_kernels import Kernels
from mobilellm.model.products import FLOATS, PAIRS, KernelProducts, Products, TorchProducts

NARROW, WIDE = torch.bfloat16, torch.float32


@pytest.fixture(scope="module", params=["torch", FLOATS, PAIRS])
def ways(request: pytest.FixtureRequest) -> Products:
    return TorchProducts() if request.param == "torch" else by_kernels(request.param)


def by_kernels(function: str) -> KernelProducts:
    found = cpu_kernels.load()
    if not isinstance(found, Kernels):
        pytest.skip(f"no kernels for training on this machine: {found}")
    if function not in found:
        pytest.skip("this processor multiplies no pairs of bfloat16")
    return KernelProducts(found, function)


def drawn(*shape: int, dtype: torch.dtype = NARROW, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def near(found: Tensor, exact: Tensor, operand: float = 0.0) -> bool:
    """To the rounding of the dtype, each sum relative to all of them; `operand` for rounded operands."""
    limit = (2**-8 if found.dtype == NARROW else 1e-5) + operand
    return bool((found.double() - exact).norm() <= limit * exact.norm() + 1e-30)


sizes = st.integers(1, 40) | st.sampled_from([95, 96, 97, 193])


@pytest.mark.parametrize("function", [FLOATS, PAIRS])
@settings(max_examples=60, deadline=None)
@given(
    sizes, sizes, sizes | st.sampled_from([639, 641, 1601, 3300, 4101]), st.integers(1, 3),
    st.integers(1, 3), st.tuples(*[st.booleans()] * 6),
)  # fmt: skip
def test_every_layout_and_dtype(
    function: str, M: int, N: int, K: int, batch: int, threads: int, flags: tuple[bool, ...]
) -> None:
    """Transposed or not, bfloat16 or float32, parts of larger matrices, added to others."""
    ways, (a_turned, b_turned, a_wide, b_wide, out_wide, added) = by_kernels(function), flags
    a = drawn(batch, K, M, dtype=WIDE if a_wide else NARROW).mT if a_turned else drawn(batch, M, K)
    whole = drawn(batch, N, K + 3) if b_turned else drawn(batch, K + 3, N)
    whole = whole.to(WIDE if b_wide else NARROW)
    b = whole[:, :, 3:].mT if b_turned else whole[:, 3:]
    wider = torch.full((batch, M, N + 2), 7.0, dtype=WIDE if out_wide else NARROW)
    addend = drawn(M, N, dtype=WIDE, seed=1) if added else None
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    ways.multiply(a, b, wider[:, :, :N], addend)
    torch.set_num_threads(before)
    if function == PAIRS:
        a, b = a.to(NARROW), b.to(NARROW)
    exact = a.double() @ b.double() + (0.0 if addend is None else addend.double())
    assert near(wider[:, :, :N], exact)
    assert (wider[:, :, N:] == 7).all()


@pytest.mark.parametrize("function", [FLOATS, PAIRS])
@pytest.mark.parametrize("out", [NARROW, WIDE])
@pytest.mark.parametrize(("N", "K"), [(1400, 1600), (2700, 1601)], ids=["whole in depth", "in two parts"])
def test_more_columns_than_are_copied_at_a_time(N: int, K: int, out: torch.dtype, function: str) -> None:
    """As a head has, whose vocabulary is wide."""
    a, b, addend = drawn(7, K), drawn(N, K, seed=1).t(), drawn(7, N, dtype=WIDE, seed=2)
    exact = a.double() @ b.double()
    assert near(by_kernels(function).multiply(a, b, out), exact)
    assert near(by_kernels(function).multiply(a, b, out, addend), exact + addend)


@pytest.mark.parametrize("function", [FLOATS, PAIRS])
def test_more_rows_than_are_copied_at_a_time(function: str) -> None:
    """As the gradient of a head has."""
    a, b = drawn(1600, 2700).t(), drawn(1600, 5, seed=1)
    assert near(by_kernels(function).multiply(a, b, WIDE), a.double() @ b.double())


@pytest.mark.parametrize("function", [FLOATS, PAIRS])
@pytest.mark.parametrize(("M", "N"), [(0, 5), (5, 0)])
def test_nothing_to_multiply(M: int, N: int, function: str) -> None:
    assert by_kernels(function).multiply(drawn(M, 7), drawn(7, N)).shape == (M, N)


def test_one_dimension_of_batches_at_most() -> None:
    with pytest.raises(AssertionError):
        by_kernels(FLOATS).multiply(drawn(2, 3, 6, 8), drawn(2, 3, 8, 5))


@pytest.mark.parametrize("dtype", [NARROW, WIDE])
def test_several_weights_are_one(ways: Products, dtype: torch.dtype) -> None:
    rows = [5, 17, 33]
    weights = [drawn(count, 24, dtype=WIDE, seed=count) for count in rows]
    whole, x, dy = torch.cat(weights).double(), drawn(40, 24), drawn(40, sum(rows), seed=1)
    rounded = 0.0 if isinstance(ways, KernelProducts) and ways.function == FLOATS else 2**-8
    assert near(ways.through(x, *weights), x.double() @ whole.t(), rounded)
    assert near(ways.back(dy, *weights), dy.double() @ whole, rounded)
    parts = ways.gradients(dy, x, rows, dtype)
    assert [part.dtype for part in parts] == [dtype] * 3
    assert [len(part) for part in parts] == rows
    exact = dy.double().t() @ x.double()
    assert near(torch.cat(parts).to(NARROW), exact, 2**-8)


@pytest.mark.parametrize("function", [FLOATS, PAIRS])
@pytest.mark.parametrize("turned", [False, True])
def test_the_number_of_threads_changes_no_bit(function: str, turned: bool) -> None:
    ways, before = by_kernels(function), torch.get_num_threads()
    a, b = drawn(2100, 300).t() if turned else drawn(300, 2100), drawn(2100, 150, dtype=WIDE)
    found = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        found.append(ways.multiply(a, b, WIDE))
    torch.set_num_threads(before)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


def test_what_is_not_a_number_stays_so(ways: Products) -> None:
    for poison, where in product((float("nan"), float("inf")), (0, 8)):
        a, b = drawn(9, 9), drawn(9, 9, dtype=WIDE)
        a[where, 4] = poison
        found = ways.multiply(a, ways.operand(b, NARROW))
        assert not found[where].isfinite().any()
        assert found.isfinite().sum() == 72
