"""What a GPU would be given for documents that stand alone, held against the dense mask and against each alone.

FlexAttention runs forward on a CPU. The kernel of `varlen_attn` does not: a plain loop over documents takes its
place under torch's own operator, so that all around it is what a GPU would run.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask

from mobilellm.model import document_mask, transformer
from mobilellm.model.document_mask import (
    Documents,
    attend_apart,
    block_mask,
    dense_mask,
    document_starts,
    pack,
    segmented_view,
    way_to_attend,
)
from mobilellm.model.training import training_hidden
from mobilellm.model.transformer import MobileLLM
from mobilellm.presets import preset
from varlen_stand_in import kernels_on_the_cpu

CPU = torch.device("cpu")
CONFIG = preset("test-ls")
LENGTHS = st.lists(st.integers(1, 60), min_size=1, max_size=6)


def numbered(*rows: list[int]) -> Tensor:
    """Segments of rows of documents of these lengths."""
    return torch.stack([torch.repeat_interleave(torch.arange(len(row)), torch.tensor(row)) for row in rows])


@pytest.fixture
def stand_in() -> Iterator[None]:
    with kernels_on_the_cpu():
        yield


@pytest.fixture
def by_varlen(stand_in: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """All models take that way."""
    monkeypatch.setattr(document_mask, "way_to_attend", lambda device, dtype: "varlen")


# FlexAttention


@settings(max_examples=12)
@given(LENGTHS, st.integers(1, 3), st.integers(1, 2))
@pytest.mark.filterwarnings("ignore:flex_attention called without")
def test_the_same_attention_as_by_the_dense_mask(lengths: list[int], groups: int, kv_heads: int) -> None:
    starts = document_starts(numbered(lengths, lengths[::-1]))
    T, generator = starts.shape[1], torch.Generator().manual_seed(0)
    q = torch.randn(2, groups * kv_heads, T, 16, generator=generator)
    k, v = (torch.randn(2, kv_heads, T, 16, generator=generator) for _ in range(2))
    blocks = attend_apart(q, k, v, block_mask(starts))
    torch.testing.assert_close(blocks, transformer._attend(q, k, v, dense_mask(starts)), atol=1e-5, rtol=1e-5)


@settings(max_examples=30)
@given(st.lists(st.integers(1, 400), min_size=1, max_size=8), st.lists(st.integers(1, 400), min_size=1))
def test_the_blocks_are_those_torch_finds_in_the_whole_mask(first: list[int], second: list[int]) -> None:
    T = min(sum(first), sum(second))
    starts = document_starts(torch.cat([numbered(row)[:, :T] for row in (first, second)]))
    ours = block_mask(starts)
    theirs = create_block_mask(ours.mask_mod, 2, None, T, T, device="cpu")
    for name in ("kv_num_blocks", "full_kv_num_blocks", "q_num_blocks", "full_q_num_blocks"):
        counts, wanted = getattr(ours, name), getattr(theirs, name)
        assert torch.equal(counts, wanted), name
        indices = (getattr(mask, name.replace("num_blocks", "indices")) for mask in (ours, theirs))
        for count, mine, other in zip(
            counts.flatten().tolist(), *(each.flatten(0, 2) for each in indices), strict=True
        ):
            assert torch.equal(mine[:count], other[:count]), name
    assert ours.seq_lengths == theirs.seq_lengths == (T, T)


@pytest.mark.filterwarnings("ignore:flex_attention called without")
def test_the_whole_model_takes_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    model = MobileLLM(CONFIG, torch.Generator().manual_seed(0))
    tokens = torch.arange(60).view(2, 30)
    segments = (torch.arange(30) // 11).repeat(2, 1)
    with torch.no_grad():
        dense = model.hidden(tokens, segments=segments)
        monkeypatch.setattr(document_mask, "way_to_attend", lambda device, dtype: "flex")
        assert isinstance(segmented_view(segments, CPU, torch.float32)[1], BlockMask)
        torch.testing.assert_close(model.hidden(tokens, segments=segments), dense, atol=1e-5, rtol=1e-5)


def test_queries_and_keys_take_the_dtype_of_the_values() -> None:
    """Under autocast the rotary embedding leaves them in float32."""
    starts = torch.zeros(1, 8, dtype=torch.long)
    q = torch.randn(1, 2, 8, 16)
    out = attend_apart(q, q, q.bfloat16(), block_mask(starts))
    assert out.dtype == torch.bfloat16


@torch.no_grad()
def test_compiled_blocks_take_other_masks_without_compiling_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each mask has a function of its own, with starts of its own; forward only, as a CPU can."""
    monkeypatch.setattr(document_mask, "way_to_attend", lambda device, dtype: "flex")
    model = MobileLLM(replace(CONFIG, num_layers=1), torch.Generator().manual_seed(0))
    tokens = torch.arange(120).view(2, 60)
    few, many = numbered([60], [31, 29]), numbered([2] * 30, [1] * 30 + [30])
    view = dense_mask(document_starts(many))
    positions = torch.arange(60) - document_starts(many)
    torch._dynamo.reset()
    for block in model.model.layers:
        block.compile(backend="aot_eager", fullgraph=True)
    model.hidden(tokens, segments=few)
    with torch.compiler.set_stance("fail_on_recompile"):
        compiled = model.hidden(tokens, segments=many)
    with torch.compiler.set_stance("force_eager"):
        torch.testing.assert_close(
            compiled, model.hidden(tokens, positions=positions, mask=view), atol=1e-5, rtol=1e-5
        )


# Documents in a line


@settings(max_examples=50)
@given(st.lists(LENGTHS, min_size=1, max_size=3))
def test_bounds_of_documents(rows: list[list[int]]) -> None:
    """Every document once, in order, then empty ones; the number of bounds changes seldom."""
    T = min(map(sum, rows))
    segments = torch.cat([numbered(row)[:, :T] for row in rows])
    bounds, longest, _ = pack(document_starts(segments), CPU)
    assert longest == T
    assert len(bounds) == 65
    lengths = [int((row == number).sum()) for row in segments for number in row.unique()]
    assert bounds.diff().tolist() == lengths + [0] * (64 - len(lengths))


def test_room_for_many_documents() -> None:
    for count, room in ((64, 64), (65, 128), (129, 256)):
        bounds = pack(document_starts(numbered([1] * count)), CPU).bounds
        assert len(bounds) == room + 1
        assert bounds.unique().tolist() == list(range(count + 1))
    long = pack(torch.zeros(32, 2048, dtype=torch.long), CPU).bounds
    assert len(long) == 32 * 2048 // 256 + 1


@settings(max_examples=20)
@given(LENGTHS, st.integers(1, 3), st.integers(1, 2))
def test_attention_through_the_line(lengths: list[int], groups: int, kv_heads: int) -> None:
    """Grouped heads or not, forward and backward, against the dense mask."""
    starts = document_starts(numbered(lengths, lengths[::-1]))
    T, generator = starts.shape[1], torch.Generator().manual_seed(0)
    shapes = ((2, groups * kv_heads, T, 16), (2, kv_heads, T, 16), (2, kv_heads, T, 16))
    parts = [torch.randn(shape, generator=generator).requires_grad_() for shape in shapes]
    direction = torch.randn(shapes[0], generator=generator)
    with kernels_on_the_cpu():
        ours = attend_apart(*parts, pack(starts, CPU))
        gradients = torch.autograd.grad(ours, parts, direction)
    theirs = transformer._attend(*parts, dense_mask(starts))
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(gradients, torch.autograd.grad(theirs, parts, direction), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("again", [False, True])
def test_a_model_sees_each_document_alone(by_varlen: None, again: bool) -> None:
    """Hidden states and all gradients, with activations kept or computed again."""
    model = MobileLLM(CONFIG, torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(1)
    lengths = ([7, 1, 22], [30], [12, 18])
    tokens = torch.randint(3, CONFIG.vocab_size, (3, 30), generator=generator)
    direction = torch.randn(3, 30, CONFIG.hidden_size, generator=generator)
    together, apart = model, copy.deepcopy(model)
    hidden, _ = training_hidden(together, tokens, numbered(*lengths), again)
    (hidden * direction).sum().backward()
    for row, documents in enumerate(lengths):
        first = 0
        for length in documents:
            part = slice(first, first + length)
            alone = apart.hidden(tokens[row : row + 1, part])
            torch.testing.assert_close(hidden[row, part], alone[0], atol=1e-5, rtol=1e-5)
            (alone[0] * direction[row, part]).sum().backward()
            first += length
    for (name, mine), other in zip(together.named_parameters(), apart.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, other.grad, atol=1e-4, rtol=1e-4, msg=name)


def test_a_compiled_model_takes_other_documents_without_compiling_again(by_varlen: None) -> None:
    config = replace(CONFIG, num_layers=1)
    model = MobileLLM(config, torch.Generator().manual_seed(0))
    tokens = torch.arange(120).view(2, 60)
    few, many = numbered([60], [31, 29]), numbered([2] * 30, [1] * 30 + [30])
    plain = [training_hidden(model, tokens, segments)[0] for segments in (few, many)]
    torch._dynamo.reset()
    for block in model.model.layers:
        block.compile(backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(training_hidden(model, tokens, few)[0], plain[0], atol=1e-5, rtol=1e-5)
    with torch.compiler.set_stance("fail_on_recompile"):
        compiled = training_hidden(model, tokens, many)[0]
    torch.testing.assert_close(compiled, plain[1], atol=1e-5, rtol=1e-5)
    compiled.sum().backward()  # type: ignore[no-untyped-call]


# Which way


def test_a_way_proves_itself_once(stand_in: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """The proof itself, on the CPU; a kernel that mixes documents up does not pass."""
    assert document_mask._agrees("varlen", CPU)
    with monkeypatch.context() as patch:
        patch.setattr(document_mask, "dense_mask", lambda starts: dense_mask(torch.zeros_like(starts)))
        assert not document_mask._agrees("varlen", CPU)


def test_a_way_with_other_gradients_does_not_pass(stand_in: None, monkeypatch: pytest.MonkeyPatch) -> None:
    def twice_the_gradient(*arguments: Any) -> Tensor:
        out = attend_apart(*arguments)
        return 2 * out - out.detach()

    monkeypatch.setattr(document_mask, "attend_apart", twice_the_gradient)
    assert not document_mask._agrees("varlen", CPU)


def test_what_does_not_work_falls_back_and_says_so(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    tried = list[str]()

    def agrees(way: str, device: torch.device) -> bool:
        tried.append(way)
        if device.index == 7:
            raise RuntimeError("no triton")
        return way == "flex"

    monkeypatch.setattr(document_mask, "_agrees", agrees)
    document_mask.works.cache_clear()
    half, gpu, broken = torch.bfloat16, torch.device("cuda", 6), torch.device("cuda", 7)
    assert way_to_attend(gpu, half) == "flex"
    assert "FlashAttention over documents computes something else on cuda:6; not used" in caplog.text
    assert way_to_attend(broken, half) == "dense"
    assert "FlexAttention does not run on cuda:7 (no triton)" in caplog.text
    assert way_to_attend(gpu, half) == "flex"
    assert tried == ["varlen", "flex", "varlen", "flex"]  # once each
    assert way_to_attend(CPU, half) == "dense"
    assert len(tried) == 4
    document_mask.works.cache_clear()


def test_the_first_that_works_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """FlashAttention has no kernels for 32 bits."""
    monkeypatch.setattr(document_mask, "works", lambda way, device: True)
    gpu = torch.device("cuda", 0)
    ways = {dtype: way_to_attend(gpu, dtype) for dtype in (torch.bfloat16, torch.float16, torch.float32)}
    assert list(ways.values()) == ["varlen", "varlen", "flex"]


def test_in_products_of_autocast(monkeypatch: pytest.MonkeyPatch) -> None:
    """The dtype that decides is that of the products, not that of the weights."""
    asked = list[torch.dtype]()
    monkeypatch.setattr(document_mask, "way_to_attend", lambda device, dtype: asked.append(dtype) or "dense")
    model = MobileLLM(CONFIG, torch.Generator().manual_seed(0))
    tokens, segments = torch.arange(8)[None], torch.zeros(1, 8, dtype=torch.long)
    with torch.no_grad():
        model.hidden(tokens, segments=segments)
        with torch.autocast("cpu", torch.bfloat16):
            model.hidden(tokens, segments=segments)
            training_hidden(model, tokens, segments)
    assert asked == [torch.float32, torch.bfloat16, torch.bfloat16]


def test_documents_are_what_a_block_is_told(by_varlen: None) -> None:
    positions, mask = segmented_view(numbered([3, 5], [8]), CPU, torch.bfloat16)
    assert isinstance(mask, Documents)
    assert positions.tolist() == [[0, 1, 2, 0, 1, 2, 3, 4], list(range(8))]
