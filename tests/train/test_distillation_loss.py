"""The loss of distillation against torch's own autograd over whole logits, in plain torch and in C."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_runs import LS, tiny_model
from torch import Tensor

from mobilellm.train import loss as loss_module
from mobilellm.train.distillation_loss import Distillation, Mixture, distillation_loss
from mobilellm.train.loss import linear_loss


def teacher_of(logits: Tensor, temperature: float, k: int) -> tuple[Tensor, Tensor]:
    """Ids (N, k), and logarithms (N, k + 1) of what a teacher with these logits gives them and all others."""
    logs = (logits / temperature).log_softmax(-1)
    top = logs.topk(k)
    others = logs.scatter(-1, top.indices, -torch.inf).logsumexp(-1)
    return top.indices, torch.cat([top.values, others[:, None]], -1)


def whole(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    weights: Tensor,
    ids: Tensor,
    logs: Tensor,
    mixture: Mixture,
) -> Tensor:
    """The formula as it is written, over whole logits."""
    T = mixture.temperature
    logits = F.linear(hidden, weight)
    q = (logits / T).softmax(-1)
    named = q.gather(-1, ids)
    events = torch.cat([named, 1 - named.sum(-1, keepdim=True)], -1)
    p = logs.exp()
    divergence = torch.where(p > 0, p * (p.log() - events.clamp(min=1e-300).log()), 0).sum(-1)
    nll = F.cross_entropy(logits, targets, reduction="none")
    each = mixture.ce_weight * nll + mixture.kl_weight * T * T * divergence
    return torch.dot(each + mixture.z_loss * logits.logsumexp(-1).square(), weights)


def problem(N: int, E: int, V: int, k: int, temperature: float, seed: int = 0) -> tuple[Tensor, ...]:
    """hidden, head, targets, weights (some of them 0), ids, logs; in float64."""
    draw = torch.Generator().manual_seed(seed)
    options = {"generator": draw, "dtype": torch.float64}
    hidden, weight = torch.randn(N, E, **options), 0.5 * torch.randn(V, E, **options)
    weights = torch.rand(N, **options) * (torch.rand(N, generator=draw) < 0.8)
    ids, logs = teacher_of(2 * torch.randn(N, V, **options), temperature, k)
    return hidden, weight, torch.randint(V, (N,), generator=draw), weights, ids, logs


def chunked(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    weights: Tensor,
    ids: Tensor,
    logs: Tensor,
    mixture: Mixture,
) -> Tensor:
    return linear_loss(hidden, weight, Distillation(targets, weights, ids, logs, mixture))


def value_and_gradients(function: object, inputs: tuple[Tensor, ...], mixture: Mixture) -> list[Tensor]:
    hidden, weight = (part.clone().requires_grad_() for part in inputs[:2])
    loss = function(hidden, weight, *inputs[2:], mixture)  # type: ignore[operator]
    (loss / 7).backward()
    assert hidden.grad is not None
    assert weight.grad is not None
    return [loss.detach(), hidden.grad, weight.grad]


def distance(a: Tensor, b: Tensor) -> float:
    return ((a - b).norm() / b.norm().clamp(min=1e-30)).item()


@settings(max_examples=40, deadline=None)
@given(
    N=st.integers(1, 40), E=st.integers(1, 20), V=st.integers(2, 50), share=st.floats(0, 1),
    rows=st.integers(1, 50), temperature=st.sampled_from([0.5, 1.0, 2.0]),
    ce_weight=st.sampled_from([0.0, 0.3]), kl_weight=st.sampled_from([0.7, 1.0]),
    z_loss=st.sampled_from([0.0, 0.1]),
)  # fmt: skip
def test_chunks_of_any_size_give_what_autograd_gives_of_whole_logits(
    N: int, E: int, V: int, share: float, rows: int, temperature: float, ce_weight: float, kl_weight: float,
    z_loss: float,
) -> None:  # fmt: skip
    mixture = Mixture(temperature, ce_weight, kl_weight, z_loss)
    inputs = problem(N, E, V, max(1, round(share * V)), temperature, seed=N)
    theirs = value_and_gradients(whole, inputs, mixture)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loss_module, "CHUNK_ROWS", rows)
        patch.setattr(loss_module, "CHUNK_LOGITS", 0)
        exact = value_and_gradients(chunked, inputs, mixture)
        single = tuple(part.float() if part.is_floating_point() else part for part in inputs)
        narrow = value_and_gradients(chunked, single, mixture)
    for ours, rounded, reference in zip(exact, narrow, theirs, strict=True):
        assert torch.allclose(ours, reference, rtol=1e-8, atol=1e-9)
        assert torch.allclose(rounded.double(), reference, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("k", [1, 5, 12])
def test_gradients_are_those_of_the_value(temperature: float, k: int) -> None:
    """Against finite differences."""
    _, _, targets, weights, ids, logs = problem(6, 4, 12, k, temperature)
    logits = torch.randn(6, 12, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    terms = Distillation(targets, weights, ids, logs, Mixture(temperature, 0.3, 0.7, 0.01))
    everything, step = slice(0, 6), 1e-6
    _, gradient = terms.gradient(logits, everything)
    for place in np.ndindex(6, 12):
        shift = torch.zeros_like(logits)
        shift[place] = step
        slope = terms.value(logits + shift, everything) - terms.value(logits - shift, everything)
        assert abs(slope.item() / (2 * step) - gradient[place].item()) < 1e-7


def test_with_the_whole_vocabulary_it_is_torchs_kl_div() -> None:
    draw = torch.Generator().manual_seed(1)
    student, teacher = torch.randn(2, 9, 30, generator=draw, dtype=torch.float64)
    ids, logs = teacher_of(teacher, 2.0, 30)
    head, targets, weights = (
        torch.eye(30, dtype=torch.float64),
        torch.zeros(9, dtype=torch.int64),
        torch.ones(9),
    )
    ours = chunked(student, head, targets, weights, ids, logs, Mixture(2.0, 0.0, 1.0))
    logs_of_student = (student / 2).log_softmax(-1)
    theirs = F.kl_div(logs_of_student, (teacher / 2).log_softmax(-1), reduction="sum", log_target=True)
    assert torch.allclose(ours, 4 * theirs)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 1000), k=st.integers(1, 29))
def test_fewer_tokens_never_say_more_and_the_teacher_itself_loses_nothing(seed: int, k: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    student, teacher = torch.randn(2, 3, 30, generator=draw, dtype=torch.float64)
    head, targets, weights = (
        torch.eye(30, dtype=torch.float64),
        torch.zeros(3, dtype=torch.int64),
        torch.ones(3),
    )

    def divergence(logits: Tensor, k: int) -> float:
        return chunked(
            logits, head, targets, weights, *teacher_of(teacher, 1.0, k), Mixture(1.0, 0.0, 1.0)
        ).item()

    assert -1e-9 < divergence(student, k) <= divergence(student, k + 1) + 1e-9
    assert abs(divergence(teacher, k)) < 1e-9


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize(("k", "rows"), [(1, 512), (16, 16), (384, 512)])
def test_in_bfloat16_the_kernel_stays_near(
    k: int, rows: int, temperature: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loss_module, "CHUNK_ROWS", rows)
    monkeypatch.setattr(loss_module, "CHUNK_LOGITS", 0)
    mixture = Mixture(temperature, 0.3, 0.7, 1e-4)
    inputs = problem(100, 64, 384, k, temperature)
    exact = value_and_gradients(whole, inputs, mixture)
    single = [part.float() if part.is_floating_point() else part for part in inputs]
    single[4], single[5] = single[4].to(torch.int32), single[5].half()  # as they are stored
    with torch.autocast("cpu", torch.bfloat16):
        narrow = value_and_gradients(chunked, tuple(single), mixture)
    for ours, theirs, limit in zip(narrow, exact, (2e-3, 2e-2, 2e-2), strict=True):
        assert 0 < distance(ours.double(), theirs) < limit


def test_the_kernel_and_plain_torch_agree_row_by_row() -> None:
    """The same logits in bfloat16, the target among the teacher's tokens and not."""
    _, _, targets, weights, ids, logs = problem(64, 4, 384, 8, 2.0)
    targets[::2] = ids[::2, 3]
    logits = torch.randn(64, 384, generator=torch.Generator().manual_seed(2)).mul_(3).bfloat16()
    for temperature in (1.0, 2.0):
        terms = Distillation(targets, weights.float(), ids, logs, Mixture(temperature, 0.4, 0.6, 1e-3))
        loss, gradient = terms.gradient(logits.clone(), slice(0, 64))
        plain_loss, plain = terms.gradient(logits.float(), slice(0, 64))
        assert torch.allclose(loss, plain_loss, rtol=1e-5)
        assert torch.allclose(gradient.float(), plain, rtol=5e-3, atol=1e-6)
        assert torch.allclose(plain_loss, terms.value(logits.float(), slice(0, 64)))


@pytest.mark.parametrize("narrow", [False, True], ids=["float32", "bfloat16"])
def test_a_student_who_is_sure_of_the_named_tokens_still_gets_numbers(narrow: bool) -> None:
    """Of the others it gives less than a float holds, the teacher half."""
    logits = torch.full((2, 10), -300.0)
    logits[:, :2] = 0
    ids, logs = torch.tensor([[0, 1]] * 2), torch.tensor([[0.25, 0.25, 0.5]] * 2).log()
    terms = Distillation(torch.tensor([0, 5]), torch.ones(2), ids, logs, Mixture(1.0, 0.5, 0.5))
    loss, gradient = terms.gradient(logits.bfloat16() if narrow else logits, slice(0, 2))
    assert loss.isfinite()
    assert gradient.isfinite().all()
    assert (gradient[:, 2:].float().sum(-1) < 0).all()  # it is told to give them more


@pytest.mark.parametrize("narrow", [False, True], ids=["float32", "bfloat16"])
def test_of_a_model_it_is_the_formula_over_its_logits(narrow: bool) -> None:
    model, plain = tiny_model(LS), tiny_model(LS)
    draw = torch.Generator().manual_seed(3)
    tokens, targets = torch.randint(384, (2, 3, 20), generator=draw)
    weights = (torch.rand(3, 20, generator=draw) < 0.5).float()
    ids, logs = teacher_of(torch.randn(60, 384, generator=draw), 2.0, 8)
    with torch.autocast("cpu", torch.bfloat16, enabled=narrow):
        loss = distillation_loss(2.0, 0.4, 0.6)(
            model, tokens, targets, weights, teacher_ids=ids.view(3, 20, 8), teacher_logs=logs.view(3, 20, 9)
        )
    loss.backward()
    hidden = plain.hidden(tokens).flatten(0, 1)
    reference = whole(
        hidden, plain.head_weight, targets.flatten(), weights.flatten(), ids, logs, Mixture(2.0, 0.4, 0.6)
    )
    reference.backward()  # type: ignore[no-untyped-call]
    assert distance(loss, reference) < (1e-3 if narrow else 1e-5)
    for (name, a), b in zip(model.named_parameters(), plain.parameters(), strict=True):
        assert a.grad is not None
        assert b.grad is not None
        assert distance(a.grad, b.grad) < (4e-2 if narrow else 1e-4), name


def test_ids_outside_of_the_vocabulary_are_refused() -> None:
    logits, targets, weights = torch.randn(2, 10).bfloat16(), torch.tensor([1, 2]), torch.ones(2)
    for ids in (torch.tensor([[1], [10]]), torch.tensor([[-1], [1]])):
        terms = Distillation(targets, weights, ids, torch.zeros(2, 2), Mixture(1.0, 0.5, 0.5))
        with pytest.raises((ValueError, RuntimeError, IndexError), match="int64|bounds"):
            terms.gradient(logits.clone(), slice(0, 2))
