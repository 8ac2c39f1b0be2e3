"""One number that is infinite or none, at any place of a block: what is computed of it is no number, as the readable
definition has it. A maximum of floats would forget a NaN that others come after."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from gguf_files import SHAPE, exported

from mobilellm.gguf import read_gguf
from mobilellm.gguf_blocks import BLOCK
from mobilellm.runtime import engine, reference

if (fault := engine.missing()) is not None:
    pytest.skip(f"the native engine was not compiled: {fault}", allow_module_level=True)

FAULTS = pytest.mark.parametrize("fault", [np.nan, -np.nan, np.inf, -np.inf])
pytestmark = pytest.mark.filterwarnings("ignore:invalid value")


@FAULTS
@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0"])
def test_of_an_activation(tmp_path: Path, isa: str, kind: str, fault: float) -> None:
    file, _ = exported(tmp_path, kind)
    native, readable = engine.load(file, 2, isa), reference.load(file)
    places = SHAPE.hidden_size
    states = np.random.default_rng(0).normal(size=(places + 1, places)).astype(np.float32)
    states[np.arange(places), np.arange(places)] = fault
    right, found = readable.logits(states), native.logits(states)
    for logits in (right, found, np.concatenate([native.logits(state[None]) for state in states])):
        assert np.isnan(logits[:-1]).all()
        assert np.isfinite(logits[-1]).all()


@FAULTS
def test_of_a_value_in_8_bits(tmp_path: Path, isa: str, fault: float) -> None:
    """A row of weights that is no number gives such a number to every token: in every head at another place."""
    heads = replace(SHAPE, num_heads=BLOCK, num_kv_heads=BLOCK, head_dim=BLOCK)
    file, _ = exported(tmp_path, "F32", heads)
    weights = read_gguf(file).tensors["blk.0.attn_v.weight"]
    with file.open("r+b") as damaged:
        for head in range(BLOCK):
            row = head * BLOCK + head
            damaged.seek(weights.offset + row * heads.hidden_size * 4)
            damaged.write(np.float32(fault).tobytes())
    native, readable = engine.load(file, 2, isa, "q8_0"), reference.load(file, "q8_0")
    ours, theirs = native.new_cache(), readable.new_cache()
    tokens = np.arange(3, 23)
    native.forward(tokens, ours)
    readable.forward(tokens, theirs)
    kept = ours.state().values[0]
    np.testing.assert_array_equal(kept, theirs.state().values[0])
    assert (kept[..., :2].view(np.float16) == np.inf).all()
    assert not kept[..., 2:].any()
