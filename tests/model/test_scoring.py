"""The pass to score with computes what the modules compute, by C or by torch."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mobilellm.model import cpu_kernels, scoring
from mobilellm.model.fused import fuse
from mobilellm.model.products import has_bfloat16
from mobilellm.model.scoring import states_at, summary
from mobilellm.model.transformer import MobileLLM
from model.random_models import SHARED, assert_near, random_model, shared_model, some_tokens

PATHS = ["kernels", "plain"]


@pytest.fixture(params=PATHS)
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Each way in turn; where the kernels are to be tested they must have been called."""
    there, called = list[bool](), list[str]()
    original = scoring._kernels

    def noted(weight: Tensor) -> Callable[..., None] | None:
        kernels = original(weight) if request.param == "kernels" else None
        there.append(kernels is not None)

        def call(name: str, *arguments: Tensor | float | None) -> None:
            assert kernels is not None
            called.append(name)
            kernels(name, *arguments)

        return None if kernels is None else call

    if request.param == "kernels" and isinstance(cpu_kernels.load(), str):
        pytest.skip(f"needs the C kernels: {cpu_kernels.load()}")
    monkeypatch.setattr(scoring, "_kernels", noted)
    yield str(request.param)
    assert bool(called) == any(there)


def check_states(model: MobileLLM, ends: Tensor | None) -> None:
    tokens, places = some_tokens(101, 3, 11), torch.tensor([0, 7, 10, 11, 32])
    positions = torch.stack([torch.arange(11), torch.arange(11) % 4, torch.arange(11) // 2])
    mask = None if ends is None else visible(ends)
    with torch.no_grad():
        wanted = model.hidden(tokens, positions=positions, mask=mask).flatten(0, 1)[places]
    assert_near(states_at(model, fuse(model), tokens, positions, ends, places), wanted)


def visible(ends: Tensor) -> Tensor:
    """(B, 1, T, T), the definition."""
    B, T = ends.shape
    rows = [[[c <= t < int(ends[row, c]) for c in range(T)] for t in range(T)] for row in range(B)]
    return torch.tensor(rows)[:, None]


def random_ends(B: int, T: int, seed: int = 0) -> Tensor:
    """Every node sees itself; how far it is seen is any number."""
    reach = torch.randint(0, T, (B, T), generator=torch.Generator().manual_seed(seed))
    return (torch.arange(T) + 1 + reach // 2).clamp(max=T).to(torch.int32)


@pytest.mark.parametrize(("order", "repeats"), SHARED)
def test_states_of_every_order_of_layer_sharing(path: str, order: str, repeats: int) -> None:
    check_states(shared_model(order, repeats), None)


def test_states_where_what_is_seen_ends(path: str) -> None:
    check_states(shared_model("reverse", 2), random_ends(3, 11))


def test_heads_that_the_kernels_have_no_room_for_take_the_plain_way() -> None:
    model = shared_model("immediate", 1, head_dim=24)
    check_states(model, random_ends(3, 11))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("B", "T", "K", "G", "D"),
    [(1, 1, 1, 1, 16), (2, 33, 2, 1, 32), (1, 300, 1, 3, 64), (1, 129, 3, 5, 48), (1, 257, 1, 7, 80)],
)
def test_attention(dtype: torch.dtype, B: int, T: int, K: int, G: int, D: int) -> None:
    kernels = cpu_kernels.load()
    if isinstance(kernels, str):
        pytest.skip(f"needs the C kernels: {kernels}")
    H, narrowed = K * G, dtype == torch.bfloat16
    generator = torch.Generator().manual_seed(0)
    joint = (torch.randn(B, T, H + 2 * K, D, generator=generator) * 2).to(dtype)
    angle = torch.rand(B, T, 1, D // 2, generator=generator) * 6

    def turned(heads: Tensor) -> Tensor:
        a, b = heads.chunk(2, -1)
        cos, sin = angle.cos(), angle.sin()
        return torch.cat([a * cos - b * sin, b * cos + a * sin], -1).to(dtype).float().transpose(1, 2)

    q, k, v = joint.float().split([H, K, K], dim=2)
    for ends in (None, random_ends(B, T)):
        out, rows = torch.empty(B, T, H, D, dtype=dtype), joint.clone()
        kernels("attention", rows, angle.cos(), angle.sin(), ends, out, int(narrowed), B, T, K, G, D)
        mask = torch.ones(T, T, dtype=torch.bool).tril() if ends is None else visible(ends)
        wanted = F.scaled_dot_product_attention(
            turned(q), turned(k), v.transpose(1, 2), attn_mask=mask, enable_gqa=True
        ).transpose(1, 2)
        torch.testing.assert_close(
            out.float(),
            wanted,
            **({"atol": 0.03, "rtol": 0.02} if narrowed else {"atol": 1e-5, "rtol": 1e-4}),
        )


def test_bfloat16_keeps_its_sums_in_float32(path: str) -> None:
    """Nearer to the same weights in float32 than arithmetic that rounds every sum."""
    model = shared_model("immediate", 1).to(torch.bfloat16)
    tokens, positions = some_tokens(101, 2, 50), torch.arange(50).repeat(2, 1)
    places = torch.arange(100)
    states = states_at(model, fuse(model), tokens, positions, None, places)
    assert states.dtype == torch.bfloat16
    with torch.no_grad():
        plain = model.hidden(tokens, fused=fuse(model)).flatten(0, 1)
        exact = copy.deepcopy(model).float().hidden(tokens).flatten(0, 1)
    error, of_plain = ((each.float() - exact).pow(2).mean().sqrt() for each in (states, plain))
    assert error <= of_plain < 0.1 * exact.pow(2).mean().sqrt()
    if path == "plain" or not has_bfloat16():
        assert torch.equal(states, plain)


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
    narrow = logits.to(torch.bfloat16)
    total, highest = summary(narrow)
    torch.testing.assert_close(total, narrow.double().logsumexp(-1).float(), atol=1e-5, rtol=1e-6)
    assert highest.tolist() == [row.index(max(row)) for row in narrow.tolist()]


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
