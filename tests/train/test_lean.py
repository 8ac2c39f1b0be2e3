"""Training on a CPU in bfloat16 with its own optimiser and bfloat16 gradients: when, and that it learns the same."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny_runs import LS, ORDINARY, same_weights, stop_at, timeless, tiny_model, tiny_run, tiny_settings

from mobilellm.config import ModelConfig
from mobilellm.train import lean
from mobilellm.train.distributed import World
from mobilellm.train.loss import weighted_loss

ONCE = {"precision": "bfloat16", "micro_batch": 4}
"""All sequences of a step at a time."""


pytestmark = pytest.mark.usefixtures("kernels")


def dtypes(**changes: object) -> set[torch.dtype]:
    """Of the gradients of matrices within a run."""
    model, settings = tiny_model(), tiny_settings(**(ONCE | changes))
    tokens = torch.randint(384, (2, 16))
    with lean.gradients(model, settings, World()):
        with torch.autocast("cpu", torch.bfloat16):
            loss = weighted_loss(model, tokens, tokens, torch.ones(2, 16))
        loss.backward()  # type: ignore[no-untyped-call]
        found = {p.grad.dtype for p in model.parameters() if p.grad is not None and p.ndim == 2}
        norms = {p.grad.dtype for p in model.parameters() if p.grad is not None and p.ndim == 1}
    assert norms == {torch.float32}
    assert {p.grad_dtype for p in model.parameters()} == {torch.float32}
    return found


def test_gradients_are_narrow_with_one_micro_batch_only() -> None:
    assert dtypes() == {torch.bfloat16}
    assert dtypes(micro_batch=2) == {torch.float32}
    assert dtypes(precision="float32") == {torch.float32}
    assert dtypes(compile=True) == {torch.float32}
    assert dtypes(**{"optim.name": "muon"}) == {torch.float32}


def test_where_the_own_optimiser_is_not_the_right_one() -> None:
    model, settings = tiny_model(), tiny_settings(**ONCE)
    assert lean.kernels(model, settings, World()) is not None
    assert lean.kernels(model, settings, World(size=2)) is None
    assert lean.kernels(model.double(), settings, World()) is None
    frozen = tiny_model()
    frozen.model.norm.requires_grad_(False)
    assert lean.kernels(frozen, settings, World()) is not None  # it has no state of what is frozen


@pytest.mark.parametrize(
    "config", [LS, replace(ORDINARY, tie_word_embeddings=False)], ids=["shared and tied", "untied"]
)
def test_the_run_is_the_plain_one(
    config: ModelConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Losses and gradient norms of ten steps, with and without, are alike to the rounding of bfloat16."""
    settings = tiny_settings(clip_norm=1.5, **ONCE)
    fast = tiny_run(tmp_path / "fast", settings, config)
    monkeypatch.setattr(lean, "_fits", lambda *_: False)
    plain = tiny_run(tmp_path / "plain", settings, config)
    assert fast.losses != plain.losses
    assert fast.losses == pytest.approx(plain.losses, rel=3e-3)
    norms = ([record["gradient_norm"] for record in run.records] for run in (fast, plain))
    assert next(norms) == pytest.approx(next(norms), rel=5e-2)
    assert max(plain.losses) - min(plain.losses) > 0.1


def test_a_resumed_run_is_the_uninterrupted_one(tmp_path: Path) -> None:
    """Bit for bit."""
    settings = tiny_settings(**ONCE)
    whole = tiny_run(tmp_path / "whole", settings)
    first = tiny_run(tmp_path / "parts", settings, on_record=stop_at(5))
    assert first.done == 5
    second = tiny_run(tmp_path / "parts", settings)
    assert same_weights(whole.model, second.model)
    assert timeless(first.records + second.records) == timeless(whole.records)


def test_its_checkpoints_are_those_of_the_plain_optimiser(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = tiny_settings(**ONCE)
    whole = tiny_run(tmp_path / "whole", settings)
    tiny_run(tmp_path / "parts", settings, on_record=stop_at(5))
    monkeypatch.setattr(lean, "_fits", lambda *_: False)
    rest = tiny_run(tmp_path / "parts", settings)
    assert rest.losses == pytest.approx(whole.losses[5:], rel=3e-3)
