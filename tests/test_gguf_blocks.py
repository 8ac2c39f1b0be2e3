from __future__ import annotations

import numpy as np
import pytest
from gguf import GGMLQuantizationType
from gguf.quants import dequantize, quantize
from hypothesis import given
from hypothesis import strategies as st

from mobilellm.gguf_blocks import TYPES, split_q4_0, split_q8_0


def drawn(seed: int, exponent: int, zeros: bool, equal: bool) -> np.ndarray:
    """(3, 64) numbers around 10^exponent; some of them 0, or of one magnitude with both signs."""
    generator = np.random.default_rng(seed)
    values = generator.normal(size=(3, 64)) * 10.0**exponent
    if equal:
        values = np.sign(values) * 10.0**exponent
    if zeros:
        values[0], values[1, ::3] = 0, 0
    return values.astype(np.float32)


ROWS = st.builds(drawn, st.integers(0, 2**32), st.integers(-12, 3), st.booleans(), st.booleans())


@pytest.mark.parametrize("name", TYPES)
@given(values=ROWS)
def test_bytes_and_numbers_are_those_of_the_gguf_package(name: str, values: np.ndarray) -> None:
    kind = TYPES[name]
    theirs = GGMLQuantizationType(kind.number)
    raw = kind.encode(values)
    assert raw.nbytes == kind.nbytes(values.shape) == values.size * kind.bits / 8
    np.testing.assert_array_equal(raw.reshape(3, -1), quantize(values, theirs).view(np.uint8).reshape(3, -1))
    decoded = dequantize(
        raw.view(np.float32 if name == "F32" else np.float16 if name == "F16" else np.uint8).reshape(3, -1),
        theirs,
    )
    np.testing.assert_array_equal(kind.decode(raw, values.shape), decoded)


@pytest.mark.parametrize("name", TYPES)
def test_more_numbers_than_are_encoded_at_once(name: str) -> None:
    """Give the bytes of their rows."""
    values = np.random.default_rng(0).normal(size=(2100, 64)).astype(np.float32)
    rows = [TYPES[name].encode(row) for row in np.array_split(values, 7)]
    np.testing.assert_array_equal(TYPES[name].encode(values), np.concatenate(rows))


@pytest.mark.parametrize(("name", "split", "most"), [("Q8_0", split_q8_0, 127), ("Q4_0", split_q4_0, 8)])
@given(values=ROWS)
def test_parts_multiply_to_the_numbers(name: str, split: object, most: int, values: np.ndarray) -> None:
    kind = TYPES[name]
    raw = kind.encode(values)
    scales, whole = split(raw.reshape(-1, kind.block_bytes))  # type: ignore[operator]
    assert whole.shape == (6, 32)
    assert np.abs(whole.astype(int)).max() <= most
    np.testing.assert_array_equal(
        (scales[:, None] * whole).reshape(values.shape), kind.decode(raw, values.shape)
    )


@given(values=ROWS)
def test_rounding_loses_no_more_than_half_a_step(values: np.ndarray) -> None:
    for name, steps in (("Q8_0", 127), ("Q4_0", 8)):
        kind = TYPES[name]
        found = kind.decode(kind.encode(values), values.shape)
        step = np.abs(values.reshape(-1, 32)).max(axis=1) / steps
        lost = np.abs(found - values).reshape(-1, 32).max(axis=1)
        # Q4_0 has no +8: what is as large as the largest, with the other sign, loses a whole step.
        allowed = step * (0.51 if name == "Q8_0" else 1.01) + 1e-3 * step * steps + 5e-6  # scales in float16
        assert (lost <= allowed).all()


def test_what_cannot_be_stored_is_refused() -> None:
    with pytest.raises(ValueError, match="rows of 48 numbers are no multiple of 32"):
        TYPES["Q8_0"].encode(np.zeros((2, 48), np.float32))
    with pytest.raises(ValueError, match="not finite"):
        TYPES["F16"].encode(np.array([np.nan], np.float32))
    with pytest.raises(ValueError, match="above 65,504"):
        TYPES["F16"].encode(np.array([1e6], np.float32))
    with pytest.raises(ValueError, match="too large for blocks"):
        TYPES["Q8_0"].encode(np.full((1, 32), 1e8, np.float32))
