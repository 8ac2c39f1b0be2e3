"""The pass to score with computes what the modules compute, by C or by torch."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mobilellm.model import cpu_kernels, scoring
from mobilellm.model.fused import fuse
from mobilellm.model.scoring import states_at, summary
from mobilellm.model.transformer import MobileLLM
from model.random_models import SHARED, assert_near, random_model, shared_model, some_tokens

PATHS = ["kernels", "plain"]


@pytest.fixture(params=PATHS)
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Each way in turn."""
    if request.param == "plain":
        monkeypatch.setattr(scoring, "_kernels", lambda weight: None)
    elif isinstance(cpu_kernels.load(), str):
        pytest.skip(f"needs the C kernels: {cpu_kernels.load()}")
    return str(request.param)


def check_states(model: MobileLLM, mask: Tensor | None) -> None:
    tokens, places = some_tokens(101, 3, 11), torch.tensor([0, 7, 10, 11, 32])
    positions = torch.stack([torch.arange(11), torch.arange(11) % 4, torch.arange(11) // 2])
    with torch.no_grad():
        wanted = model.hidden(tokens, positions=positions, mask=mask).flatten(0, 1)[places]
    assert_near(states_at(model, fuse(model), tokens, positions, mask, places), wanted)


@pytest.mark.parametrize(("order", "repeats"), SHARED)
def test_states_of_every_order_of_layer_sharing(path: str, order: str, repeats: int) -> None:
    check_states(shared_model(order, repeats), None)


def test_states_under_a_mask(path: str) -> None:
    generator = torch.Generator().manual_seed(0)
    mask = (torch.rand(3, 1, 11, 11, generator=generator) < 0.5).tril() | torch.eye(11, dtype=torch.bool)
    check_states(shared_model("reverse", 2), mask)


def test_bfloat16_takes_the_plain_way() -> None:
    model = shared_model("immediate", 1).to(torch.bfloat16)
    tokens, positions = some_tokens(101, 2, 5), torch.arange(5).repeat(2, 1)
    states = states_at(model, fuse(model), tokens, positions, None, torch.tensor([4]))
    assert states.dtype == torch.bfloat16
    with torch.no_grad():
        assert torch.equal(states, model.hidden(tokens, fused=fuse(model))[0, 4:])


@settings(deadline=None)
@given(st.integers(1, 5), st.integers(1, 70), st.integers(0, 10**6), st.sampled_from([0.1, 10.0, 1000.0]))
def test_summary_of_logits(rows: int, vocabulary: int, seed: int, spread: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = (torch.randn(rows, vocabulary, generator=generator) * spread).round(
        decimals=1
    )  # ties are common
    total, highest = summary(logits)
    torch.testing.assert_close(total, logits.double().logsumexp(-1).float(), atol=1e-5, rtol=1e-6)
    assert highest.tolist() == [row.index(max(row)) for row in logits.tolist()]


def test_summary_without_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    logits = torch.tensor([[0.0, 3.0, 3.0], [1.0, 0.0, -1.0]])
    with_kernels = summary(logits)
    monkeypatch.setattr(scoring, "_kernels", lambda weight: None)
    plain = summary(logits)
    assert with_kernels.highest.tolist() == plain.highest.tolist() == [1, 0]
    torch.testing.assert_close(with_kernels.total, plain.total)


def test_what_is_no_number_stays_none() -> None:
    assert summary(torch.tensor([[0.0, float("nan"), 1.0]])).total.isnan().all()


def test_the_embedding_is_left_as_it_was(path: str) -> None:
    model = random_model(shared_model("immediate", 1).config)
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    check_states(model, None)
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())
