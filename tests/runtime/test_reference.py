from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from gguf_files import SHAPE, exported, shared

from mobilellm.gguf import GGUF
from mobilellm.gguf_blocks import TYPES
from mobilellm.model.transformer import MobileLLM
from mobilellm.runtime import reference

TOKENS = np.random.default_rng(0).integers(3, 300, 40)


def in_8_bits(x: torch.Tensor) -> torch.Tensor:
    runs = x.unflatten(-1, (-1, 32))
    scale = runs.abs().amax(-1, keepdim=True) / 127
    return ((runs / scale.clamp(min=1e-30)).round() * scale).flatten(-2)


@pytest.fixture
def in_double(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sums so exact that no order of them moves an input of a matrix in blocks across a rounding."""
    stored = GGUF.array
    monkeypatch.setattr(GGUF, "array", lambda file, name: stored(file, name).astype(np.float64))


@torch.no_grad()
def torch_logits(model: MobileLLM, kind: str) -> np.ndarray:
    """Of the model with its matrices and their inputs rounded as the file says, in double precision."""
    model = model.double()
    if TYPES[kind].block > 1:
        for module in model.modules():
            if isinstance(module, torch.nn.Linear) and module.in_features % 32 == 0:
                module.register_forward_pre_hook(lambda _, inputs: (in_8_bits(inputs[0]),))
        states = model.hidden  # the tied head is no module of its own
        model.hidden = lambda tokens: in_8_bits(states(tokens))  # type: ignore[assignment, method-assign]
    for parameter in model.parameters():
        if parameter.ndim == 2:
            values = parameter.numpy()
            fits = values.shape[-1] % TYPES[kind].block == 0
            block_type = TYPES[kind if fits else "F16"]
            stored = block_type.encode(values.astype(np.float32))
            parameter.copy_(torch.from_numpy(block_type.decode(stored, values.shape)))
    return model.logits(model.hidden(torch.from_numpy(TOKENS)[None]))[0].numpy()


class WideCache(reference.Cache):
    """One that rounds nothing."""

    def append(self, step: int, keys: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        end = self.length + len(keys)
        for kept, new in (self._keys, keys), (self._values, values):
            kept[step, self.length : end] = new
        return self._keys[step, :end], self._values[step, :end]


def wide_cache(model: reference.ReferenceModel) -> reference.Cache:
    cache = WideCache(model.config, model.config.max_position_embeddings, "f16")
    cache._keys, cache._values = cache._keys.astype(np.float32), cache._values.astype(np.float32)
    return cache


def close(found: np.ndarray, expected: np.ndarray, tolerance: float) -> bool:
    """Relative to the spread of the logits."""
    return float(np.abs(found - expected).max()) < tolerance * float(expected.std())


@pytest.mark.parametrize("kind", TYPES)
def test_it_computes_what_the_model_in_torch_computes(tmp_path: Path, kind: str, in_double: None) -> None:
    file, model = exported(tmp_path, kind)
    ours = reference.load(file)
    expected = torch_logits(model, kind)
    assert close(ours.logits(ours.forward(TOKENS, wide_cache(ours))), expected, 2e-5)
    # Keys and values in float16 move an input of a matrix in blocks across a rounding here and there.
    blocks = TYPES[kind].block > 1
    assert close(ours.logits(ours.forward(TOKENS, ours.new_cache())), expected, 0.2 if blocks else 5e-3)


@pytest.mark.parametrize(
    "config",
    [
        replace(SHAPE, tie_word_embeddings=False),
        *(shared(order, repeats) for order in ("immediate", "all-over", "reverse") for repeats in (2, 3)),
    ],
)
def test_untied_and_shared_models_too(tmp_path: Path, config: object) -> None:
    file, model = exported(tmp_path, "F32", config)  # type: ignore[arg-type]
    ours = reference.load(file)
    logits = ours.logits(ours.forward(TOKENS, wide_cache(ours)))
    assert close(logits, torch_logits(model, "F32"), 1e-5)


@pytest.mark.parametrize("kind", ["F32", "Q4_0"])
def test_shared_equals_unrolled(tmp_path: Path, kind: str) -> None:
    config = shared("reverse", 2)
    file, _ = exported(tmp_path / "a", kind, config)
    unrolled, _ = exported(tmp_path / "b", kind, config, unroll=True)
    a, b = reference.load(file), reference.load(unrolled)
    assert not b.config.shares_layers
    assert unrolled.stat().st_size > 1.5 * file.stat().st_size - 40_000
    np.testing.assert_array_equal(a.forward(TOKENS, a.new_cache()), b.forward(TOKENS, b.new_cache()))


@pytest.mark.parametrize("kind", ["F32", "Q8_0"])
def test_any_chunking_gives_the_same(tmp_path: Path, kind: str, in_double: None) -> None:
    file, _ = exported(tmp_path, kind)
    ours = reference.load(file)
    whole = ours.forward(TOKENS, ours.new_cache())
    cache = ours.new_cache(len(TOKENS))
    parts = [ours.forward(part, cache) for part in np.split(TOKENS, [1, 2, 17])]
    np.testing.assert_allclose(np.concatenate(parts), whole, rtol=0, atol=1e-5)


def test_a_cache_cut_back_goes_on_as_if_nothing_had_been(tmp_path: Path) -> None:
    file, _ = exported(tmp_path, "F32")
    ours = reference.load(file)
    cache = ours.new_cache()
    ours.forward(TOKENS, cache)
    cache.truncate(20)
    again = ours.forward(TOKENS[20:], cache)
    np.testing.assert_allclose(again, ours.forward(TOKENS, ours.new_cache())[20:], rtol=0, atol=1e-4)


def test_eight_bits_are_those_of_a_plain_loop() -> None:
    x = np.random.default_rng(1).normal(size=(3, 96)).astype(np.float32)
    x[1, 32:64] = 0
    rounded = reference.round_to_8_bits(x)
    for row, found in zip(x, rounded, strict=True):
        for start in range(0, 96, 32):
            run = row[start : start + 32]
            scale = max(abs(float(each)) for each in run) / 127
            whole = [round(float(each) / scale) if scale else 0 for each in run]
            assert found[start : start + 32] == pytest.approx([each * scale for each in whole], abs=1e-6)


def test_what_cannot_be_fed_is_refused_and_nothing_is_written(tmp_path: Path) -> None:
    file, _ = exported(tmp_path, "F32")
    ours = reference.load(file)
    cache = ours.new_cache(4)
    with pytest.raises(ValueError, match="0 of 4 tokens and cannot take 5 more"):
        ours.forward(TOKENS[:5], cache)
    with pytest.raises(ValueError, match="not in the vocabulary of 320"):
        ours.forward(np.array([320]), cache)
    with pytest.raises(ValueError, match="not empty"):
        ours.forward(np.array([], dtype=np.int64), cache)
    with pytest.raises(ValueError, match="1 … 96, the context"):
        ours.new_cache(97)
    assert cache.length == 0
