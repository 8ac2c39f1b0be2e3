"""The blocks that FlexAttention would see on a GPU, held against the dense mask; on a CPU, where it runs forward."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mobilellm.model import document_mask, transformer
from mobilellm.model.document_mask import attend_in_blocks, block_mask, document_starts, segmented_view
from mobilellm.model.transformer import MobileLLM
from mobilellm.presets import preset


@settings(deadline=None, max_examples=30)
@given(st.lists(st.integers(1, 60), min_size=1, max_size=6), st.integers(1, 3), st.integers(1, 2))
@pytest.mark.filterwarnings("ignore:flex_attention called without")
def test_the_same_attention_as_by_the_dense_mask(lengths: list[int], groups: int, kv_heads: int) -> None:
    segments = torch.cat([torch.full((length,), number) for number, length in enumerate(lengths)])
    segments = torch.stack((segments, segments.flip(0)))
    T, generator = segments.shape[1], torch.Generator().manual_seed(0)
    q = torch.randn(2, groups * kv_heads, T, 16, generator=generator)
    k, v = (torch.randn(2, kv_heads, T, 16, generator=generator) for _ in range(2))
    _, dense = segmented_view(segments)
    blocks = attend_in_blocks(q, k, v, block_mask(document_starts(segments)))
    torch.testing.assert_close(blocks, transformer._attend(q, k, v, dense), atol=1e-5, rtol=1e-5)


@pytest.mark.filterwarnings("ignore:flex_attention called without")
def test_the_whole_model_takes_either(monkeypatch: pytest.MonkeyPatch) -> None:
    model = MobileLLM(preset("test-ls"), torch.Generator().manual_seed(0))
    tokens = torch.arange(60).view(2, 30)
    segments = (torch.arange(30) // 11).repeat(2, 1)
    with torch.no_grad():
        dense = model.hidden(tokens, segments=segments)
        monkeypatch.setattr(document_mask, "flex_works", lambda device: True)
        assert not isinstance(segmented_view(segments)[1], torch.Tensor)  # it is FlexAttention's now
        torch.testing.assert_close(model.hidden(tokens, segments=segments), dense, atol=1e-5, rtol=1e-5)


def test_queries_and_keys_take_the_dtype_of_the_values() -> None:
    """Under autocast the rotary embedding leaves them in float32."""
    starts = torch.zeros(1, 8, dtype=torch.long)
    q = torch.randn(1, 2, 8, 16)
    out = attend_in_blocks(q, q, q.bfloat16(), block_mask(starts))
    assert out.dtype == torch.bfloat16


def test_what_does_not_run_falls_back_and_says_so(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(device: torch.device) -> bool:
        raise RuntimeError("no triton")

    monkeypatch.setattr(document_mask, "_agrees", broken)
    assert not document_mask.flex_works(torch.device("cuda", 7))
    assert "no triton" in caplog.text
    assert not document_mask.flex_works(torch.device("cpu"))
