"""Adapters in the loop: only they move, checkpoints hold only them, going on is exact, other bases are refused."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("peft", reason="needs the extra finetune")

from safetensors import safe_open
from tiny_runs import (
    LS,
    Run,
    same_weights,
    stop_at,
    timeless,
    tiny_loader,
    tiny_model,
    tiny_settings,
    tiny_stream,
)

from mobilellm.model.adapters import adapt, merged, narrow
from mobilellm.model.transformer import MobileLLM
from mobilellm.presets import preset
from mobilellm.train.checkpoint_files import checkpoints
from mobilellm.train.loop import train
from mobilellm.train.lora import (
    TARGETS,
    LoraChoice,
    adapter_parameters,
    flops_not_needed,
)
from mobilellm.train.loss import weighted_loss
from mobilellm.train.metrics import Record
from mobilellm.train.settings import TrainSettings

FAST: dict[str, Any] = {"precision": "bfloat16", "micro_batch": 2, "steps": 8}
KINDS: dict[str, dict[str, Any]] = {"lora": {"dropout": 0.2}, "dora": {"dora": True}}


def adapted(base: MobileLLM | None = None, half: bool = True, **changes: Any) -> MobileLLM:
    model = base or tiny_model(LS)
    values: dict[str, Any] = {
        "rank": 4, "alpha": 8.0, "dropout": 0.0, "targets": TARGETS, "dora": False, "rslora": False, "seed": 1,
    }  # fmt: skip
    adapt(model, **(values | changes))
    if half:
        narrow(model)
    return model


def run(
    directory: Path,
    model: MobileLLM,
    settings: TrainSettings | None = None,
    on_record: Callable[[Record], None] | None = None,
) -> Run:
    settings, records = settings or tiny_settings(**FAST), list[Record]()

    def seen(record: Record) -> None:
        records.append(record)
        if on_record is not None:
            on_record(record)

    done, stopped = train(model, tiny_loader(settings), settings, directory, on_record=seen)
    return Run(done, stopped, model, records)


@pytest.fixture(scope="module")
def half_trained(tmp_path_factory: pytest.TempPathFactory) -> MobileLLM:
    """From frozen random embeddings nothing is learnt."""
    settings = tiny_settings(steps=40, every=40, warmup_steps=5)
    return run(tmp_path_factory.mktemp("base"), tiny_model(LS), settings).model


@torch.no_grad()
def loss(model: MobileLLM) -> float:
    """Nats a token of all that the loader gives."""
    rows = torch.tensor(tiny_stream()[: 17 * 35].astype(np.int64)).view(35, 17)
    inputs, targets = rows[:, :-1], rows[:, 1:]
    return weighted_loss(model, inputs, targets, torch.ones(targets.shape)).item() / targets.numel()


@pytest.mark.parametrize("kind", KINDS)
def test_it_learns_and_nothing_frozen_moves(tmp_path: Path, half_trained: MobileLLM, kind: str) -> None:
    before = {name: p.clone() for name, p in adapted(copy.deepcopy(half_trained)).named_parameters()}
    model = adapted(copy.deepcopy(half_trained), **KINDS[kind])
    done = run(tmp_path, model, tiny_settings(**(FAST | {"steps": 24, "every": 24, "lr": 2e-2})))
    assert loss(merged(done.model)) < loss(half_trained) - 0.15
    for name, parameter in done.model.named_parameters():
        moved = name not in before or not torch.equal(parameter, before[name])
        assert moved == parameter.requires_grad, name
        assert parameter.requires_grad or parameter.grad is None, name


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("step", [1, 4])
def test_stopped_and_resumed_is_the_same_run(tmp_path: Path, kind: str, step: int) -> None:
    whole = run(tmp_path / "whole", adapted(**KINDS[kind]))
    first = run(tmp_path / "parts", adapted(**KINDS[kind]), on_record=stop_at(step))
    assert first.done == step
    second = run(tmp_path / "parts", adapted(**KINDS[kind]))
    assert timeless(first.records + second.records) == timeless(whole.records)
    assert same_weights(second.model, whole.model)


def test_a_checkpoint_holds_adapters_only(tmp_path: Path) -> None:
    done = run(tmp_path, adapted())
    (file,) = checkpoints(tmp_path / "checkpoints")[-1].glob("*.safetensors")
    with safe_open(file, "pt") as stream:
        names = set(stream.keys())
    trained = {name for name, p in done.model.named_parameters() if p.requires_grad}
    assert {name for name in names if name.startswith("model.")} == {f"model.{name}" for name in trained}
    assert len(names) == 4 * len(trained)  # itself, two moments, steps
    numbers = adapter_parameters(LoraChoice(rank=4), LS)
    assert 12 * numbers < os.path.getsize(file) < 12 * numbers + 60_000  # what is left tells the names


def test_another_base_or_other_adapters_are_refused(tmp_path: Path) -> None:
    run(tmp_path, adapted(), tiny_settings(**FAST))
    other = tiny_model(LS)
    with torch.no_grad():
        other.model.norm.weight[3] += 1e-3  # type: ignore[index, operator]
    with pytest.raises(
        ValueError, match=r"belongs to a run with other settings \(base = '[0-9a-f]{64}', not"
    ):
        run(tmp_path, adapted(other))
    with pytest.raises(ValueError, match="other settings"):
        run(tmp_path, tiny_model(LS))
    with pytest.raises(ValueError, match=r"lora_A.* is \(4, 64\).*, not \(3, 64\)"):
        run(tmp_path, adapted(rank=3))


def test_in_float32_it_is_what_peft_computes(tmp_path: Path) -> None:
    """And what rounding changes is little: merged, both are about the same model."""
    exact = run(tmp_path / "exact", adapted(half=False), tiny_settings(**(FAST | {"precision": "float32"})))
    fast = run(tmp_path / "fast", adapted())
    assert fast.losses == pytest.approx(exact.losses, rel=0.01)
    tokens = torch.arange(20)[None]
    with torch.no_grad():
        a, b, base = (model(tokens) for model in (merged(exact.model), merged(fast.model), tiny_model(LS)))
    assert (a - b).norm() < 0.2 * (a - base).norm()


def test_what_is_wrong_with_a_table_is_told_at_once() -> None:
    problems = LoraChoice(rank=0, alpha=-1.0, dropout=1.0, targets=("q_proj", "c_attn")).problems()
    assert [text.split(" must")[0] for text in problems] == [
        "lora.rank = 0", "lora.alpha = -1.0", "lora.dropout = 1.0", "lora.targets = ['q_proj', 'c_attn']",
    ]  # fmt: skip
    assert LoraChoice(targets=()).problems()
    assert LoraChoice(targets=("q_proj", "q_proj")).problems()
    assert LoraChoice().problems() == []


def test_counts_of_the_published_shape() -> None:
    config = preset("125m")
    # Of a block 576 x 576 twice, 192 x 576 twice, 1536 x 576 three times: sums of sides, by hand.
    sides = 2 * (576 + 576) + 2 * (192 + 576) + 3 * (1536 + 576)
    assert adapter_parameters(LoraChoice(rank=8), config) == 30 * 8 * sides
    rows = 576 + 2 * 192 + 576 + 2 * 1536 + 576
    assert adapter_parameters(LoraChoice(rank=8, dora=True), config) == 30 * (8 * sides + rows)
    matrices = 30 * (2 * 576 * 576 + 2 * 192 * 576 + 3 * 1536 * 576) + 32_000 * 576
    assert flops_not_needed(LoraChoice(rank=8), config) == 2 * matrices - 6 * 30 * 8 * sides
