"""The cache changes nothing: cached equals uncached at every position, for every schedule, split and padding."""

from __future__ import annotations

import copy
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from random_models import SHARED, TINY, assert_near, random_model, shared_model, some_tokens, stock_twin
from torch import Tensor

from mobilellm.model.cache import KVCache
from mobilellm.model.checkpoint import unroll
from mobilellm.model.fused import FusedWeights, fuse
from mobilellm.model.transformer import MobileLLM

by_schedule = pytest.mark.parametrize("how", SHARED, ids=lambda how: f"{how[0]}-{how[1]}")


@torch.inference_mode()
def in_pieces(
    model: MobileLLM, tokens: Tensor, cuts: list[int], cache: KVCache, fused: FusedWeights | None = None
) -> Tensor:
    """Logits (B, T, V) of tokens fed in pieces that end at `cuts` and at T."""
    edges = [0, *sorted(cuts), tokens.shape[1]]
    pieces = [tokens[:, start:end] for start, end in pairwise(edges) if end > start]
    return torch.cat(
        [model.logits(model.hidden(piece, cache, fused=fused), fused) for piece in pieces], dim=1
    )


@by_schedule
def test_one_token_at_a_time_equals_no_cache(how: tuple[str, int]) -> None:
    model = shared_model(*how)
    tokens = some_tokens(101, 2, 16)
    with torch.inference_mode():
        expected = model(tokens)
    logits = in_pieces(model, tokens, list(range(1, 16)), model.new_cache(2, 16))
    assert_near(logits, expected)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_any_pieces_equal_no_cache_and_the_twin(data: st.DataObject) -> None:
    model = shared_model(*data.draw(st.sampled_from(SHARED)), layers=2)
    batch, length = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 20))
    cuts = data.draw(st.lists(st.integers(1, length), max_size=6))
    spare = data.draw(st.integers(0, 5))
    fused = fuse(model) if data.draw(st.booleans()) else None
    tokens = some_tokens(101, batch, length, seed=data.draw(st.integers(0, 99)))
    cache = model.new_cache(batch, length + spare)
    logits = in_pieces(model, tokens, cuts, cache, fused)
    assert cache.length == length
    with torch.inference_mode():
        assert_near(logits, model(tokens))
        assert_near(logits, unroll(model)(tokens))


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_a_left_padded_row_equals_the_row_alone(data: st.DataObject) -> None:
    model = shared_model(*data.draw(st.sampled_from(SHARED)), layers=2)
    lengths = data.draw(st.lists(st.integers(1, 12), min_size=1, max_size=4))
    new = data.draw(st.integers(1, 4))  # tokens that follow in every row
    longest = max(lengths)
    cuts = data.draw(st.lists(st.integers(1, longest + new), max_size=6))  # pieces of padding alone included
    fill = data.draw(st.integers(0, 100))
    fused = fuse(model) if data.draw(st.booleans()) else None
    rows = [some_tokens(101, 1, length + new, seed=row) for row, length in enumerate(lengths)]
    padding = torch.tensor([longest - length for length in lengths])
    padded = torch.cat(
        [
            torch.cat([torch.full((1, int(gap)), fill), row], dim=1)
            for gap, row in zip(padding, rows, strict=True)
        ]
    )
    cache = model.new_cache(len(rows), longest + new, padding)
    logits = in_pieces(model, padded, cuts, cache, fused)
    assert torch.isfinite(logits).all()
    for row, gap, together in zip(rows, padding, logits, strict=True):
        with torch.inference_mode():
            assert_near(together[None, int(gap) :], model(row))


def test_positions_start_after_the_padding() -> None:
    """Logits depend on distances alone; the keys show where a row is thought to begin."""
    model = shared_model("immediate", 2)
    row, cache = some_tokens(101, 1, 6), model.new_cache(2, 9, torch.tensor([3, 0]))
    alone = model.new_cache(1, 6)
    with torch.inference_mode():
        model(row, alone)
        model(torch.cat([torch.zeros(1, 3, dtype=torch.long), row], dim=1).expand(2, -1), cache)
    torch.testing.assert_close(cache.keys[:, :1, :, 3:], alone.keys, atol=1e-4, rtol=0)


def test_padding_of_zero_equals_none() -> None:
    model = shared_model("reverse", 2)
    tokens = some_tokens(101, 2, 9)
    cache = model.new_cache(2, 9, torch.zeros(2, dtype=torch.long))
    with torch.inference_mode():
        assert_near(in_pieces(model, tokens, [4, 5], cache), model(tokens))


@by_schedule
def test_one_slot_for_every_step(how: tuple[str, int]) -> None:
    """The fault of the official code is one slot for two executions; here each has its own history."""
    model = shared_model(*how)
    config = model.config
    cache = model.new_cache(2, 8)
    in_pieces(model, some_tokens(101, 2, 6), [2], cache)
    assert cache.keys.shape == cache.values.shape
    assert cache.keys.shape == (config.num_steps, 2, config.num_kv_heads, 8, config.head_dim)
    assert config.num_steps == 3 * how[1]
    histories = cache.keys[..., :6, :]
    for step in range(config.num_steps):
        for other in range(step):
            assert (histories[step] - histories[other]).abs().max() > 0.01
    stock_cache = stock_twin(model, config.schedule)(some_tokens(101, 2, 6), use_cache=True).past_key_values
    for step in range(
        config.num_steps
    ):  # in the split-half rotary layout of Llama, as transformers caches it
        theirs = stock_cache.layers[step]
        assert_near(histories[step], theirs.keys)
        assert_near(cache.values[step, ..., :6, :], theirs.values)


def test_overflow_is_refused_before_anything_is_written() -> None:
    model = shared_model("immediate", 2)
    tokens = some_tokens(101, 1, 6)
    cache = model.new_cache(1, 6)
    with torch.inference_mode():
        expected = model(tokens)
        model(tokens[:, :4], cache)
        before = cache.keys[..., :4, :].clone()
        with pytest.raises(ValueError, match="cache holds 4 of 6 tokens and cannot take 3 more"):
            model(tokens[:, :3], cache)
        assert cache.length == 4
        assert torch.equal(cache.keys[..., :4, :], before)
        assert_near(model(tokens[:, 4:], cache), expected[:, 4:])
        with pytest.raises(ValueError, match="cache holds 6 of 6 tokens and cannot take 1 more"):
            model(tokens[:, :1], cache)


def test_another_batch_is_refused() -> None:
    model = random_model(TINY)
    for rows in (1, 2, 4):
        cache = model.new_cache(3, 6)
        with pytest.raises(ValueError, match=f"cache was made for 3 rows and cannot take {rows}"):
            model(some_tokens(101, rows, 2), cache)


@pytest.mark.parametrize(("batch", "capacity"), [(0, 5), (2, 0), (1, -1)])
def test_a_cache_for_nothing_is_refused(batch: int, capacity: int) -> None:
    with pytest.raises(ValueError, match="holds nothing"):
        random_model(TINY).new_cache(batch, capacity)


def test_padding_of_another_batch_is_refused() -> None:
    for padding in (torch.zeros(3, dtype=torch.long), torch.zeros(2, 1, dtype=torch.long), torch.tensor(0)):
        with pytest.raises(ValueError, match="padding has shape"):
            random_model(TINY).new_cache(2, 5, padding)


def test_positions_and_mask_follow_from_the_cache() -> None:
    model = random_model(TINY)
    tokens = some_tokens(101, 1, 3)
    for extra in ({"positions": torch.arange(3)}, {"mask": torch.ones(3, 3, dtype=torch.bool)}):
        with pytest.raises(ValueError, match="positions and mask follow from the cache"):
            model(tokens, model.new_cache(1, 3), **extra)


@pytest.mark.parametrize("shape", [(3,), (2, 0), (0, 3), (1, 2, 3)])
def test_tokens_are_a_batch_of_rows(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="tokens have shape"):
        random_model(TINY)(torch.zeros(shape, dtype=torch.long))


@pytest.mark.parametrize("padded", [False, True])
def test_truncating_forgets(padded: bool) -> None:
    model = shared_model("all-over", 2)
    padding = torch.tensor([0, 2]) if padded else None
    tokens, draft = some_tokens(101, 2, 12), some_tokens(101, 2, 5, seed=9)
    cache, fresh = model.new_cache(2, 12, padding), model.new_cache(2, 12, padding)
    with torch.inference_mode():
        expected = model(tokens, fresh)
        model(tokens[:, :7], cache)
        model(draft, cache)
        cache.truncate(7)
        assert cache.length == 7
        assert_near(model(tokens[:, 7:], cache), expected[:, 7:])
        cache.truncate(0)
        assert_near(model(tokens, cache), expected)
    for length in (-1, 13):
        with pytest.raises(ValueError, match=f"cannot truncate a cache of 12 tokens to {length}"):
            cache.truncate(length)


def test_gradients_through_a_cache_are_refused_not_wrong() -> None:
    """A cache is written in place: torch must notice, rather than give the gradient of something else."""
    model = shared_model("immediate", 2)
    tokens = some_tokens(101, 1, 6)
    cache = model.new_cache(1, 6)
    loss = model(tokens[:, :3], cache).sum() + model(tokens[:, 3:], cache).sum()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@by_schedule
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_fused_equals_plain_in_float32(how: tuple[str, int], tied: bool) -> None:
    model = shared_model(*how, tie_word_embeddings=tied)
    tokens = some_tokens(101, 2, 20)
    with torch.inference_mode():
        fused = fuse(model)
        logits = model.logits(model.hidden(tokens, fused=fused), fused)
        assert_near(logits, model(tokens))


@pytest.mark.parametrize("rows", [1, 2, 17])
def test_fused_equals_plain_in_bfloat16(rows: int) -> None:
    """bfloat16 has 8 bits: after 6 blocks two orders of summation differ by some hundredths of the spread.

    Both must also be equally near to float32: a fused path that lost something would show there.
    """
    exact = shared_model("immediate", 2)
    model = copy.deepcopy(exact).to(torch.bfloat16)
    tokens = some_tokens(101, rows, 20)
    with torch.inference_mode():
        wanted = exact(tokens)
        plain = model(tokens).float()
        fused_weights = fuse(model)
        fused = model.logits(model.hidden(tokens, fused=fused_weights), fused_weights)
        assert fused.dtype == torch.bfloat16
        spread = wanted.std()
        assert (fused.float() - plain).abs().max() < 0.15 * spread
        error, plain_error = (fused.float() - wanted).square().mean(), (plain - wanted).square().mean()
        assert error.sqrt() < 0.03 * spread
        assert error < 1.5 * plain_error
        cached = in_pieces(model, tokens, [7, 8, 9], model.new_cache(rows, 20), fused_weights)
        assert (cached.float() - fused.float()).abs().max() < 0.15 * spread


def test_fused_equals_plain_in_other_dtypes() -> None:
    for dtype, tolerance in ((torch.float64, 1e-10), (torch.float16, 0.05)):
        model = shared_model("immediate", 2).to(dtype)
        tokens = some_tokens(101, 2, 12)
        with torch.inference_mode():
            fused = fuse(model)
            logits = model.logits(model.hidden(tokens, fused=fused), fused)
            torch.testing.assert_close(logits, model(tokens), atol=tolerance, rtol=0)
