from __future__ import annotations

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType
from gguf.quants import quantize
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mobilellm.gguf_blocks import TYPES
from mobilellm.quant.formats import FORMATS, INT4, INT8, Q4_0, Q8_0, WeightFormat, int4_in_groups


def drawn(seed: int, exponent: int, zeros: bool) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(6, 64, generator=generator) * 10.0**exponent
    if zeros:
        weight[0], weight[1, :32] = 0, 0
    return weight


WEIGHTS = st.builds(drawn, st.integers(0, 2**31), st.integers(-5, 2), st.booleans())
ALL = [*FORMATS.values(), int4_in_groups(64)]


@pytest.mark.parametrize("kind", [Q8_0, Q4_0], ids=lambda kind: kind.name)
@given(weight=WEIGHTS)
def test_codes_and_scales_are_those_of_the_gguf_package(kind: WeightFormat, weight: Tensor) -> None:
    theirs = quantize(weight.numpy(), GGMLQuantizationType(TYPES[kind.name.upper()].number)).view(np.uint8)
    matrix = kind.quantize(weight)
    np.testing.assert_array_equal(kind.file_bytes(matrix), theirs)
    decoded = TYPES[kind.name.upper()].decode(theirs, weight.shape)
    np.testing.assert_array_equal(matrix.values().numpy(), decoded)


SINGLE = st.floats(allow_nan=False, allow_infinity=False, width=32)
SMALL_GRID = st.integers(-16, 16).map(lambda whole: whole / 2)
"""Numbers with many ties: of largest magnitude, and half-way between two codes."""


@pytest.mark.parametrize("kind", [Q8_0, Q4_0], ids=lambda kind: kind.name)
@settings(deadline=None)
@given(
    numbers=st.one_of(
        st.lists(SINGLE, min_size=64, max_size=64),  # huge, subnormal, zeros of both signs
        st.lists(st.one_of(SMALL_GRID, st.sampled_from([0.0, -0.0])), min_size=64, max_size=64),
        st.lists(st.floats(-(2.0**-96), 2.0**-96, width=32), min_size=64, max_size=64),
    )
)
def test_torch_and_numpy_are_one_arithmetic_bit_for_bit(kind: WeightFormat, numbers: list[float]) -> None:
    """In the bytes of the file, the signs of zeros included; and both refuse what float16 cannot scale."""
    weight = torch.tensor(numbers).view(1, 64)
    try:
        raw = TYPES[kind.name.upper()].encode(weight.numpy())
    except ValueError:
        with pytest.raises(ValueError, match="too large for scales in float16"):
            kind.quantize(weight)
        return
    np.testing.assert_array_equal(kind.file_bytes(kind.quantize(weight)).reshape(-1), raw)


@given(weight=WEIGHTS)
def test_int4_is_torchaos_with_scales_in_bfloat16(weight: Tensor) -> None:
    """Transcribed: symmetric, -8 … 7, scale max|w| / 7.5 of each 32, x * (1 / scale) rounded half to even."""
    scale = (weight.view(6, 2, 32).abs().amax(-1) / ((7 - -8) / 2)).clamp(min=2.0**-126)
    scale = scale.bfloat16().float()
    codes = torch.clamp(torch.round(weight.view(6, 2, 32) * (1.0 / scale)[..., None]), -8, 7).view(6, 64)
    matrix = INT4.quantize(weight)
    assert torch.equal(matrix.codes, codes.to(torch.int8))
    assert torch.equal(matrix.scales.float(), scale)


@settings(deadline=None)  # the first call imports it
@given(weight=WEIGHTS)
def test_int4_against_torchao(weight: Tensor) -> None:
    workflow = pytest.importorskip(
        "torchao.quantization.quantize_.workflows.intx.intx_unpacked_to_int8_tensor"
    )
    matrix = INT4.quantize(weight)
    theirs = workflow.IntxUnpackedToInt8Tensor.from_hp(
        weight, (1, 32), torch.int4, intx_choose_qparams_algorithm=None, custom_scale=matrix.scales.float(),
        custom_zero_point=torch.zeros(6, 2, dtype=torch.int8),
    )  # fmt: skip
    assert torch.equal(matrix.codes, theirs.qdata)
    assert torch.equal(matrix.values(), theirs.dequantize())


@pytest.mark.parametrize("kind", ALL, ids=lambda kind: kind.name)
@given(weight=WEIGHTS)
def test_weights_move_by_no_more_than_a_step(kind: WeightFormat, weight: Tensor) -> None:
    matrix = kind.quantize(weight)
    assert matrix.codes.dtype == torch.int8
    assert kind.lowest <= int(matrix.codes.min()) <= int(matrix.codes.max()) <= kind.highest
    size = matrix.codes.numel() * kind.bits // 8 + matrix.scales.numel() * matrix.scales.itemsize
    assert size == kind.nbytes(6, 64) == pytest.approx(6 * 64 * kind.bits_per_weight(64) / 8)
    step = matrix.scales.float().abs()
    moved = (kind.grouped(weight) - kind.grouped(matrix.values())).abs().amax(-1)
    # Half a step, but for the end that -8 … 7 lacks (q4_0: a whole step; int4: half of one more) and for
    # the rounding of the scale.
    most = {"q4_0": 1.01, "int8": 0.501, "q8_0": 0.51}.get(kind.name, 0.58)
    largest = kind.grouped(weight).abs().amax(-1)
    assert (moved <= most * step + largest * 2.0**-9 + 5e-6).all()


@given(weight=WEIGHTS)
def test_what_is_on_the_grid_stays(weight: Tensor) -> None:
    for kind in (INT8, INT4):
        matrix = kind.quantize(weight)
        again = kind.nearest(kind.grouped(matrix.values()), matrix.scales)
        assert torch.equal(again.flatten(1), matrix.codes)


def test_what_cannot_be_stored_is_refused() -> None:
    with pytest.raises(ValueError, match="q4_0: rows of 48 weights are no whole groups of 32"):
        Q4_0.quantize(torch.zeros(2, 48))
    for kind in (INT8, INT4):
        with pytest.raises(ValueError, match="not finite"):
            kind.quantize(torch.full((2, 32), torch.nan))
    with pytest.raises(ValueError, match="not finite"):
        Q8_0.quantize(torch.full((2, 32), torch.inf))
