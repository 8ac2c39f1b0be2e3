"""Perplexity: every token once, however it is cut, and the same number as a plain loop."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mobilellm.data.loader import PackedLoader
from mobilellm.eval import perplexity
from mobilellm.eval.perplexity import Perplexity, windowed
from mobilellm.model.transformer import MobileLLM
from mobilellm.presets import preset
from mobilellm.tokenizer import BOS_ID
from mobilellm.train.loss import weighted_loss

CONFIG = replace(preset("test-ls"), vocab_size=50, max_position_embeddings=24)


@pytest.fixture(scope="module")
def model() -> MobileLLM:
    model = MobileLLM(CONFIG, torch.Generator().manual_seed(0))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(6 if parameter.ndim == 2 else 1)  # far from uniform
    return model


def some_tokens(count: int) -> list[int]:
    return torch.randint(0, 50, (count,), generator=torch.Generator().manual_seed(count)).tolist()  # type: ignore[no-any-return]


def plain_loop(model: MobileLLM, tokens: list[int], window: int) -> float:
    """Summed nats in float64: each token from the tokens before it in its own window, one at a time."""
    nats = 0.0
    for target in range(1, len(tokens)):
        start = (target - 1) // window * window
        with torch.no_grad():
            logits = model(torch.tensor([tokens[start:target]]))[0, -1].double().numpy()
        weights = np.exp(logits - logits.max())
        nats -= math.log(weights[tokens[target]] / weights.sum())
    return nats


@pytest.mark.parametrize("window", [1, 2, 5, 7, 20, 24])
def test_equals_a_plain_loop(model: MobileLLM, window: int) -> None:
    tokens = some_tokens(36)
    found = windowed(model, tokens, window, batch=3)
    assert found.nats == pytest.approx(plain_loop(model, tokens, window), rel=1e-6)
    assert found.tokens == 35
    assert found.loss == found.nats / 35
    assert found.perplexity == pytest.approx(math.exp(found.nats / 35))
    assert found.loss > 4.3  # far from uniform, which is log(50) = 3.9


@settings(deadline=None, max_examples=40)
@given(st.integers(2, 60), st.integers(1, 24), st.integers(1, 9))
def test_every_token_counts_once(model: MobileLLM, count: int, window: int, batch: int) -> None:
    """Whatever the cut into windows and batches, the tokens predicted are all but the first."""
    tokens, seen = some_tokens(count), list[int]()
    original = torch.nn.functional.cross_entropy

    def counting(logits: torch.Tensor, targets: torch.Tensor, **options: str) -> torch.Tensor:
        seen.extend(targets.tolist())
        return original(logits, targets, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(perplexity.F, "cross_entropy", counting)
        found = windowed(model, tokens, window, batch)
    assert seen == tokens[1:]
    assert found.tokens == count - 1
    assert found.nats == pytest.approx(windowed(model, tokens, window, 1).nats, rel=1e-6)


@settings(deadline=None, max_examples=20)
@given(st.integers(1, 400))
def test_logits_are_made_a_few_rows_at_a_time(model: MobileLLM, elements: int) -> None:
    tokens = some_tokens(60)
    whole = windowed(model, tokens, 20, 2)
    rows = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(perplexity, "_LOGITS_AT_ONCE", elements)
        patch.setattr(
            MobileLLM, "logits", lambda self, hidden: rows.append(len(hidden)) or hidden @ self.head_weight.T
        )
        parts = windowed(model, tokens, 20, 2)
    assert parts.nats == pytest.approx(whole.nats, rel=1e-6)
    assert max(rows) <= max(1, elements // 50)
    assert sum(rows) == 59


# Documents kept apart


@settings(deadline=None, max_examples=12)
@given(st.lists(st.integers(0, 40), min_size=1, max_size=6), st.integers(1, 24), st.integers(1, 4))
def test_documents_apart(model: MobileLLM, lengths: list[int], window: int, batch: int) -> None:
    """The same as every piece of a document that lies in one window, run alone; no BOS is predicted."""
    tokens = [
        token
        for number, length in enumerate(lengths)
        for token in (BOS_ID, *(2 + (7 * number + 3 * place) % 48 for place in range(length)))
    ]
    if all(token == BOS_ID for token in tokens[1:]):
        return
    nats, count = 0.0, 0
    for start in range(0, len(tokens) - 1, window):
        row = tokens[start : start + window + 1]
        first = [0, *(place for place in range(1, len(row)) if row[place] == BOS_ID), len(row)]
        for begin, end in itertools.pairwise(first):
            if end - begin > 1:
                nats += plain_loop(model, row[begin:end], window)
                count += end - begin - 1
    found = windowed(model, tokens, window, batch, document_mask=True)
    assert found.nats == pytest.approx(nats, rel=1e-6)
    assert found.tokens == count


def test_documents_apart_as_the_loader_has_them(model: MobileLLM) -> None:
    """The loss of training on the same windows: each target weighed as the loader weighs it."""
    tokens = np.array(some_tokens(24 * 6 + 1))
    tokens[::10] = BOS_ID
    loader = PackedLoader(tokens[:-1], 24, 6, seed=0, document_mask=True)
    batch = loader.next()
    assert batch.segments is not None
    batch.weights[batch.targets == tokens[0]] = 0  # the last window's last target would be the first token
    total = weighted_loss(
        model, *(torch.from_numpy(part) for part in batch[:3]), segments=torch.from_numpy(batch.segments)
    )
    found = windowed(model, tokens[:-1], 24, document_mask=True)
    assert found.nats == pytest.approx(total.item(), rel=1e-5)
    assert found.tokens == batch.weights.sum()
    assert found.tokens < windowed(model, tokens[:-1], 24).tokens


@pytest.mark.parametrize("ranks", [3, 4, 20])
def test_ranks_share_documents_kept_apart(model: MobileLLM, ranks: int) -> None:
    """Of nine passes three each, three at most, or one and for some none."""
    tokens = np.array(some_tokens(200))
    tokens[::7] = BOS_ID
    whole = windowed(model, tokens, 9, 3, document_mask=True)
    parts = [windowed(model, tokens, 9, 3, rank, ranks, document_mask=True) for rank in range(ranks)]
    assert sum(part.nats for part in parts) == pytest.approx(whole.nats, rel=1e-9)
    assert sum(part.tokens for part in parts) == whole.tokens


def test_documents_of_nothing(model: MobileLLM) -> None:
    with pytest.raises(ValueError, match="perplexity: 3 tokens are all BOS"):
        windowed(model, [BOS_ID] * 3, 8, document_mask=True)


@pytest.mark.parametrize("kind", [list, tuple, np.uint16, np.uint32, np.int64])
def test_any_kind_of_stream(model: MobileLLM, kind: type) -> None:
    tokens = some_tokens(30)
    stream = kind(tokens) if kind in (list, tuple) else np.array(tokens, dtype=kind)
    assert windowed(model, stream, 8) == windowed(model, tokens, 8)


def test_a_uniform_model_is_as_perplexed_as_it_has_words() -> None:
    config = replace(CONFIG, tie_word_embeddings=False)
    model = MobileLLM(config)
    with torch.no_grad():
        model.head_weight.zero_()
    found = windowed(model, some_tokens(100), 24)
    assert found.perplexity == pytest.approx(50, rel=1e-6)
    assert found.loss == pytest.approx(math.log(50), rel=1e-6)
    assert found.bits_per_byte(99) == pytest.approx(math.log2(50), rel=1e-6)  # a byte a token


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_sums_in_full(model: MobileLLM, dtype: torch.dtype) -> None:
    """The loss is summed in float32 and above: it is near the float32 model's, not rounded to 3 digits."""
    copy = MobileLLM(CONFIG)
    copy.load_state_dict(model.state_dict())
    tokens = some_tokens(400)
    found = windowed(copy.to(dtype), tokens, 24)
    assert found.nats == pytest.approx(windowed(model, tokens, 24).nats, rel=0.02)
    assert found.nats != round(found.nats, 1)


def test_bits_per_byte_by_hand() -> None:
    result = Perplexity(nats=10 * math.log(2), tokens=4)
    assert result.bits_per_byte(5) == pytest.approx(2.0)
    assert result.loss == pytest.approx(2.5 * math.log(2))
    assert result.perplexity == pytest.approx(2**2.5)


def test_numbers_without_bounds() -> None:
    assert Perplexity(1e9, 2).perplexity == math.inf
    assert math.isnan(Perplexity(math.nan, 2).perplexity)  # a broken model is not merely a bad one


def test_nothing_is_left_behind(model: MobileLLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """Training goes on afterwards: no inference tensors, no gradients, the same mode; no graph was kept."""
    kept = []

    def logits(states: Tensor) -> Tensor:
        found = MobileLLM.logits(model, states)
        kept.append(found.requires_grad)
        return found

    model.train()
    with monkeypatch.context() as patch:
        patch.setattr(model, "logits", logits)
        windowed(model, some_tokens(30), 8)
    assert {*kept} == {False}
    assert model.training
    assert all(parameter.grad is None for parameter in model.parameters())
    model(torch.tensor([[1, 2]])).sum().backward()
    model.zero_grad(set_to_none=True)


@pytest.mark.parametrize(
    ("stream", "window", "batch", "words"),
    [
        ([], 8, 1, "0 tokens predict nothing"),
        ([3], 8, 1, "1 tokens predict nothing; give at least 2"),
        ([[1, 2], [3, 4]], 8, 1, "4 tokens predict nothing"),
        ([1, 2], 0, 1, "window = 0 must lie in 1 … 24, the model's context"),
        ([1, 2], 25, 1, "window = 25 must lie in"),
        ([1, 2], 8, 0, "batch = 0 must be at least 1"),
        ([1, 50], 8, 1, "token ids 1 … 50 do not lie in the vocabulary of 50"),
        ([-1, 5], 8, 1, "token ids -1 … 5"),
        ([0.5, 1.5], 8, 1, "token ids are float64; they must be whole numbers"),
    ],
    ids=str,
)
def test_refuses(model: MobileLLM, stream: list[int], window: int, batch: int, words: str) -> None:
    with pytest.raises(ValueError, match=f"perplexity: {words}"):
        windowed(model, stream, window, batch)


def test_bits_per_byte_of_nothing() -> None:
    with pytest.raises(ValueError, match="num_bytes = 0 must be at least 1"):
        Perplexity(1.0, 1).bits_per_byte(0)
