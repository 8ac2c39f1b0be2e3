"""The loss against torch's own cross-entropy over whole logits, its gradients too."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_runs import LS, ORDINARY, tiny_model
from torch import Tensor

from mobilellm.config import ModelConfig
from mobilellm.train import loss as loss_module
from mobilellm.train.loss import linear_cross_entropy, weighted_loss

LossOfLinear = Callable[[Tensor, Tensor, Tensor, Tensor, float], Tensor]


def whole(hidden: Tensor, weight: Tensor, targets: Tensor, weights: Tensor, z_loss: float) -> Tensor:
    logits = F.linear(hidden, weight).float()
    losses = F.cross_entropy(logits, targets, reduction="none")
    return torch.dot(losses + z_loss * logits.logsumexp(-1).square(), weights)


def problem(N: int, E: int, V: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    hidden, weight = torch.randn(N, E, generator=draw), 0.3 * torch.randn(V, E, generator=draw)
    return hidden, weight, torch.randint(V, (N,), generator=draw), torch.rand(N, generator=draw)


def value_and_gradients(
    function: LossOfLinear, inputs: tuple[Tensor, ...], z_loss: float = 0.0
) -> list[Tensor]:
    hidden, weight = (part.clone().requires_grad_() for part in inputs[:2])
    loss = function(hidden, weight, inputs[2], inputs[3], z_loss)
    assert loss.dtype == torch.float32
    assert loss.shape == ()
    (loss / 7).backward()
    assert hidden.grad is not None
    assert weight.grad is not None
    return [loss.detach(), hidden.grad, weight.grad]


def distance(a: Tensor, b: Tensor) -> float:
    return ((a - b).norm() / b.norm()).item()


@settings(max_examples=30, deadline=None)
@given(
    N=st.integers(1, 40), E=st.integers(1, 20), V=st.integers(2, 50), rows=st.integers(1, 50),
    z_loss=st.sampled_from([0.0, 1e-4, 0.1]),
)  # fmt: skip
def test_chunks_of_any_size_give_the_loss_of_whole_logits(
    N: int, E: int, V: int, rows: int, z_loss: float
) -> None:
    inputs = problem(N, E, V)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loss_module, "CHUNK_ROWS", rows)
        patch.setattr(loss_module, "CHUNK_LOGITS", 0)
        chunked = value_and_gradients(linear_cross_entropy, inputs, z_loss)
    for ours, theirs in zip(chunked, value_and_gradients(whole, inputs, z_loss), strict=True):
        assert distance(ours, theirs) < 1e-5


@pytest.mark.parametrize("rows", [16, 512])
def test_bfloat16_products_stay_near(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loss_module, "CHUNK_ROWS", rows)
    monkeypatch.setattr(loss_module, "CHUNK_LOGITS", 0)
    inputs = problem(100, 64, 384)
    exact = value_and_gradients(whole, inputs, 1e-4)
    with torch.autocast("cpu", torch.bfloat16):
        narrow = value_and_gradients(linear_cross_entropy, inputs, 1e-4)
    for (ours, theirs), limit in zip(zip(narrow, exact, strict=True), (1e-3, 1e-2, 1e-2), strict=True):
        assert 0 < distance(ours, theirs) < limit


def test_a_narrow_gradient_is_the_rounded_sum_of_its_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not a sum of roundings: in 400 chunks it is as near as in one."""
    hidden, weight, targets, weights = problem(400, 16, 50)
    found = []
    for rows in (1, 400):
        monkeypatch.setattr(loss_module, "CHUNK_ROWS", rows)
        monkeypatch.setattr(loss_module, "CHUNK_LOGITS", 0)
        head = weight.clone().requires_grad_()
        head.grad_dtype = torch.bfloat16
        with torch.autocast("cpu", torch.bfloat16):
            linear_cross_entropy(hidden, head, targets, weights).backward()  # type: ignore[no-untyped-call]
        assert head.grad is not None
        found.append(head.grad.float())
    assert distance(*found) < 4e-3


@settings(max_examples=30, deadline=None)
@given(N=st.integers(1, 40), V=st.integers(2, 50), z_loss=st.sampled_from([0.0, 1e-4, 0.1]))
def test_what_a_gpu_compiles_is_the_same(N: int, V: int, z_loss: float) -> None:
    inputs = problem(N, 8, V)
    logits = inputs[0] @ inputs[1].t()
    loss, gradient = loss_module._gradient_at_once(logits.clone(), *inputs[2:], z_loss)
    plain = loss_module.CrossEntropy(*inputs[2:], z_loss, fused=False).gradient(logits, slice(0, N))
    torch.testing.assert_close((loss, gradient), plain, atol=1e-6, rtol=1e-5)


def test_compiled_between_the_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whole chunks and what is left of the last."""
    compiled = torch.compile(loss_module._gradient_at_once, dynamic=False, backend="aot_eager")
    asked: list[int] = []
    monkeypatch.setattr(loss_module, "_fused_gradient", lambda: asked.append(len(asked)) or compiled)
    monkeypatch.setattr(loss_module, "CHUNK_ROWS", 1)
    monkeypatch.setattr(loss_module, "CHUNK_LOGITS", 16 * 50)
    inputs = problem(40, 8, 50)
    fused = value_and_gradients(partial(linear_cross_entropy, fused=True), inputs, 1e-4)
    for ours, theirs in zip(fused, value_and_gradients(whole, inputs, 1e-4), strict=True):
        assert distance(ours, theirs) < 1e-5
    assert asked == [0, 1, 2]  # of 16 rows, of as many, of 8
    value_and_gradients(linear_cross_entropy, inputs, 1e-4)
    assert asked == [0, 1, 2]  # nothing is compiled where nobody asks for it


@pytest.mark.parametrize("narrow", [False, True], ids=["float32", "bfloat16"])
def test_weights_of_any_type(narrow: bool) -> None:
    """C reads them as float32."""
    hidden, weight, targets, weights = problem(30, 8, 50)
    counted = weights < 0.5
    with torch.autocast("cpu", torch.bfloat16, enabled=narrow):
        plain, *others = (
            value_and_gradients(linear_cross_entropy, (hidden, weight, targets, each))
            for each in (counted.float(), counted, counted.double(), counted.long())
        )
    for other in others:
        assert all(map(torch.equal, plain, other))


def test_without_gradients_only_the_value_is_made() -> None:
    inputs = problem(30, 8, 50)
    with torch.no_grad():
        assert distance(linear_cross_entropy(*inputs, 1e-4), whole(*inputs, 1e-4)) < 1e-6


def test_a_frozen_head_gets_no_gradient_and_hidden_states_do() -> None:
    hidden, weight, targets, weights = problem(30, 8, 50)
    hidden.requires_grad_()
    linear_cross_entropy(hidden, weight, targets, weights).backward()  # type: ignore[no-untyped-call]
    assert hidden.grad is not None
    assert weight.grad is None


def test_under_the_compiler() -> None:
    inputs = problem(30, 8, 50)
    compiled = torch.compile(linear_cross_entropy, fullgraph=True, backend="aot_eager")
    for ours, theirs in zip(
        value_and_gradients(compiled, inputs, 1e-4), value_and_gradients(whole, inputs, 1e-4), strict=True
    ):
        assert distance(ours, theirs) < 1e-5


@pytest.mark.parametrize("narrow", [False, True], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("config", [LS, ORDINARY], ids=["shared", "ordinary"])
def test_the_tied_embedding_gathers_both_its_gradients(config: ModelConfig, narrow: bool) -> None:
    """As logits, cross_entropy and autograd give them, weights of nought and two micro-batches included."""
    model, plain = tiny_model(config), tiny_model(config)
    draw = torch.Generator().manual_seed(3)
    for _ in range(2):
        tokens, targets = torch.randint(384, (2, 3, 20), generator=draw)
        weights = (torch.rand(3, 20, generator=draw) < 0.5).float()
        with torch.autocast("cpu", torch.bfloat16, enabled=narrow):
            ours = weighted_loss(model, tokens, targets, weights)
        ours.backward()  # type: ignore[no-untyped-call]
        losses = F.cross_entropy(plain(tokens).flatten(0, 1), targets.flatten(), reduction="none")
        theirs = torch.dot(losses, weights.flatten())
        theirs.backward()  # type: ignore[no-untyped-call]
        assert distance(ours, theirs) < (1e-3 if narrow else 1e-6)
    for (name, a), b in zip(model.named_parameters(), plain.parameters(), strict=True):
        assert a.grad is not None
        assert b.grad is not None
        assert distance(a.grad, b.grad) < (4e-2 if narrow else 1e-5), name


def test_targets_that_are_no_ids_are_refused() -> None:
    """In bfloat16 on a CPU the loss is C, which would write outside of the logits."""
    hidden, weight = torch.randn(4, 8, requires_grad=True), torch.randn(10, 8, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        for targets in (
            torch.tensor([1, 2, 3, 10]),
            torch.tensor([-1, 2, 3, 4]),
            torch.ones(4, dtype=torch.int32),
        ):
            with pytest.raises((ValueError, IndexError, RuntimeError), match="int64|bounds"):
                linear_cross_entropy(hidden, weight, targets, torch.ones(4))
