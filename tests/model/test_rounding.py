from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mobilellm.model.rounding import BLOCKS, ROUNDINGS, TOKEN, TOKEN_ASYMMETRIC
from mobilellm.runtime.reference import round_to_8_bits


def drawn(seed: int, exponent: int, shift: float, zeros: bool) -> Tensor:
    """(5, 96) numbers around 10^exponent, not around zero where `shift`."""
    generator = torch.Generator().manual_seed(seed)
    x = (torch.randn(5, 96, generator=generator) + shift) * 10.0**exponent
    if zeros:
        x[0], x[1, :32] = 0, 0
    return x


NUMBERS = st.builds(
    drawn, st.integers(0, 2**31), st.integers(-6, 4), st.sampled_from([0.0, 5.0, -5.0]), st.booleans()
)


@given(x=NUMBERS)
def test_blocks_are_the_runtimes_bit_for_bit(x: Tensor) -> None:
    np.testing.assert_array_equal(BLOCKS(x).numpy(), round_to_8_bits(x.numpy()))


@given(x=NUMBERS)
def test_asymmetric_tokens_are_torchaos(x: Tensor) -> None:
    """Transcribed from torchao's choose_qparams_affine and quantize_affine; compared with torchao 0.18 itself
    where it is installed."""
    low, high = x.amin(1).clamp(max=0), x.amax(1).clamp(min=0)
    scale = ((high - low) / 255.0).clamp(min=torch.finfo(torch.float32).smallest_normal)
    zero = torch.clamp(-128 - torch.round(low / scale), -128, 127)
    whole = torch.clamp(torch.round(x * (1.0 / scale)[:, None]) + zero[:, None], -128, 127)
    assert torch.equal(TOKEN_ASYMMETRIC(x), (whole - zero[:, None]) * scale[:, None])


@settings(deadline=None)  # the first call imports it
@given(x=NUMBERS)
def test_asymmetric_tokens_against_torchao(x: Tensor) -> None:
    workflow = pytest.importorskip(
        "torchao.quantization.quantize_.workflows.intx.intx_unpacked_to_int8_tensor"
    )
    assert torch.equal(TOKEN_ASYMMETRIC(x), workflow._apply_int8_act_asym_per_token_quant_dequant(x))


@pytest.mark.parametrize("name", ROUNDINGS)
@given(x=NUMBERS)
def test_gradients_go_straight_through(name: str, x: Tensor) -> None:
    """All of them, and what is computed is the same with them as without."""
    wanted, gradient = x.clone().requires_grad_(), torch.randn(x.shape)
    found = ROUNDINGS[name](wanted)
    assert torch.equal(found, ROUNDINGS[name](x))
    found.backward(gradient)  # type: ignore[no-untyped-call]
    assert wanted.grad is not None
    assert torch.equal(wanted.grad, gradient)


@pytest.mark.parametrize("name", ROUNDINGS)
@given(x=NUMBERS)
def test_no_number_moves_by_more_than_half_a_step(name: str, x: Tensor) -> None:
    rounding = ROUNDINGS[name]
    found = rounding(x)
    assert found.shape == x.shape
    groups = x.reshape(5, -1, rounding.group or 96)
    low, high = groups.amin(-1).clamp(max=0), groups.amax(-1).clamp(min=0)
    step = groups.abs().amax(-1) / 127 if rounding.symmetric else (high - low) / 255
    moved = (found - x).abs().reshape(groups.shape).amax(-1)
    # Asymmetric: the zero point is rounded too, so that the ends may lose another half step.
    most = 0.501 if rounding.symmetric else 1.001
    assert (moved <= step * most + 1e-12).all()


def test_every_token_is_rounded_by_itself() -> None:
    x = drawn(0, 0, 0.0, zeros=True)
    for rounding in ROUNDINGS.values():
        together = rounding(x.view(1, 5, 96))[0]
        assert torch.equal(together, torch.stack([rounding(row) for row in x]))
        assert torch.equal(rounding(x)[0], torch.zeros(96))


def test_the_dtype_stays() -> None:
    x = drawn(1, 0, 0.0, zeros=False)
    assert TOKEN(x.bfloat16()).dtype == torch.bfloat16
    assert torch.equal(TOKEN(x.bfloat16()), TOKEN(x.bfloat16().float()).bfloat16())
