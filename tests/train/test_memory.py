"""Memory as it is planned against what training really holds."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from test_plan import GPU, SHAPE, recipe

from mobilellm.model.adapters import adapt, narrow
from mobilellm.model.cpu_kernels import Kernels
from mobilellm.model.training import training_hidden
from mobilellm.model.transformer import MobileLLM
from mobilellm.train import loss, memory
from mobilellm.train.lora import LoraChoice
from mobilellm.train.memory import memory_per_device
from mobilellm.train.optim import build_optimizer
from mobilellm.train.plan import make_plan
from mobilellm.train.recipe import Recipe


def saved_bytes(model: MobileLLM, batch: int, length: int, bf16: bool, fast: bool) -> int:
    """What autograd keeps of a forward pass through all blocks, weights themselves left out."""
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, tuple[int, torch.Tensor]] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = (storage.nbytes(), tensor)  # alive, or its address would come again
        return tensor

    tokens = torch.randint(model.config.vocab_size, (batch, length))
    with (
        torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
        torch.autocast("cpu", torch.bfloat16, bf16),
    ):
        if fast:
            training_hidden(model, tokens)
        else:
            model.hidden(tokens)
    return sum(size for size, _ in kept.values())


@pytest.mark.parametrize("precision", ["bfloat16", "float32"])
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("repeats", [1, 2])
def test_activations_are_those_that_autograd_keeps(precision: str, compiled: bool, repeats: int) -> None:
    """Within 5 %: the estimate leaves out the tables of the rotary embedding and the token ids."""
    config = replace(SHAPE, repeats=repeats)
    made = recipe(f'[compute]\nprecision = "{precision}"\ncompile = {str(compiled).lower()}')
    planned = memory_per_device(made, config, 1, 4, recomputed=False)
    torch.compiler.reset()
    model = MobileLLM(config, torch.Generator().manual_seed(0))
    if compiled:
        for block in model.model.layers:  # the partitioner of torch.compile, without its C++
            block.compile(backend="aot_eager_decomp_partition")
    measured = saved_bytes(model, 4, 64, precision == "bfloat16", fast=False)
    assert planned.activations + planned.copies == pytest.approx(measured, rel=0.05)
    assert (planned.copies > 0) == (precision == "bfloat16")


@pytest.mark.parametrize("repeats", [1, 2])
def test_the_kernels_keep_less(kernels: Kernels, repeats: int) -> None:
    config = replace(SHAPE, repeats=repeats)
    planned = memory_per_device(recipe(), config, 1, 4, False, on_gpu=False, by_kernels=True)
    measured = saved_bytes(MobileLLM(config, torch.Generator().manual_seed(0)), 4, 64, True, fast=True)
    assert planned.activations == pytest.approx(measured, rel=0.01)
    assert planned.copies == 0


WIDE = replace(SHAPE, hidden_size=256, intermediate_size=512, num_layers=4, repeats=2)
ADAPTERS = {
    "lora": (LoraChoice(rank=4), 0.02),
    "some": (LoraChoice(targets=("q_proj", "v_proj", "down_proj")), 0.04),
    "dropout": (LoraChoice(dropout=0.1), 0.03),
    "dora": (LoraChoice(dora=True), 0.06),
}


@pytest.mark.parametrize("way", ["kernels", "bfloat16", "float32"])
@pytest.mark.parametrize("kind", ADAPTERS)
def test_activations_beside_adapters(way: str, kind: str, request: pytest.FixtureRequest) -> None:
    """Of what is frozen no input is kept. By the kernels it is exact but for a magnitude's factors."""
    pytest.importorskip("peft", reason="needs the extra finetune")
    lora, close = ADAPTERS[kind]
    if way == "kernels":
        request.getfixturevalue("kernels")
    model = MobileLLM(WIDE, torch.Generator().manual_seed(0)).train()
    adapt(model, **asdict(lora), seed=0)
    made = with_lora(lora, "float32" if way == "float32" else "bfloat16")
    planned = memory_per_device(made, WIDE, 1, 4, False, on_gpu=False, by_kernels=way == "kernels")
    if way == "kernels":
        narrow(model)
    measured = saved_bytes(model, 4, 64, way != "float32", fast=way == "kernels")
    close = 0.01 if way == "kernels" else close
    assert planned.activations + planned.copies == pytest.approx(measured, rel=close)


def with_lora(lora: LoraChoice, precision: str = "bfloat16") -> Recipe:
    made = recipe(f'[compute]\nprecision = "{precision}"')
    return replace(made, lora=lora, model=replace(made.model, init_from=Path("base")))


@pytest.mark.parametrize("by_kernels", [True, False])
@pytest.mark.parametrize("kind", ADAPTERS)
def test_what_stays_with_adapters_is_exact(
    kind: str, by_kernels: bool, request: pytest.FixtureRequest
) -> None:
    """Frozen matrices in bfloat16 by the kernels; gradients, moments and checkpoints of adapters alone."""
    pytest.importorskip("peft", reason="needs the extra finetune")
    lora, _ = ADAPTERS[kind]
    made, model = with_lora(lora), MobileLLM(SHAPE, torch.Generator().manual_seed(0))
    adapt(model, **asdict(lora), seed=0)
    if by_kernels:
        request.getfixturevalue("kernels")
        assert narrow(model)
    planned = memory_per_device(made, SHAPE, 1, 4, False, on_gpu=False, by_kernels=by_kernels)
    assert planned.weights == size(model.parameters())
    engine = build_optimizer(model, made.optim)
    with torch.autocast("cpu", torch.bfloat16):
        training_hidden(model, torch.zeros(1, 4, dtype=torch.long))[0].float().sum().backward()
    engine.step()
    assert planned.gradients == size(p.grad for p in model.parameters() if p.grad is not None)
    states = [value for state in engine.state.values() for value in state.values() if value.ndim]
    assert planned.optimizer == size(states)


def size(tensors: Any) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("tied", [True, False])
def test_what_stays_is_exact(optimizer: str, tied: bool) -> None:
    config = replace(SHAPE, tie_word_embeddings=tied)
    made = recipe(f'[optim]\nname = "{optimizer}"')
    planned = make_plan(made, config, device=GPU).memory
    model = MobileLLM(config)
    engine = build_optimizer(model, made.optim)
    model(torch.zeros(1, 4, dtype=torch.long)).sum().backward()
    engine.step()

    assert planned.weights == size(model.parameters())
    assert planned.gradients == size(parameter.grad for parameter in model.parameters())
    states = [value for state in engine.state.values() for value in state.values() if value.ndim]
    assert planned.optimizer == size(states)


def test_rounded_weights_are_counted() -> None:
    """Of every matrix once, in float32, as `quant/qat.py` holds them beside the ordinary ones."""
    model = MobileLLM(SHAPE)
    rounded = sum(4 * parameter.numel() for parameter in model.parameters() if parameter.ndim == 2)
    plain, aware = (
        memory_per_device(recipe(table), SHAPE, 1, 4, recomputed=False) for table in ("", "[qat]")
    )
    assert aware.copies - plain.copies == rounded
    assert aware.total - plain.total == rounded


def test_less_memory(tmp_path: Path) -> None:
    """Each knob acts on the part it is for, and on no other."""
    plain = memory_per_device(recipe(), SHAPE, 8, 8, recomputed=False)
    less = memory_per_device(recipe(), SHAPE, 8, 8, recomputed=True)
    assert less.activations < 0.6 * plain.activations
    assert replace(less, activations=plain.activations) == plain
    half = memory_per_device(recipe(), SHAPE, 8, 4, recomputed=False)
    assert half.activations * 2 == plain.activations
    assert half.weights == plain.weights
    sharded = memory_per_device(recipe('[compute]\nstrategy = "fsdp"'), SHAPE, 8, 8, recomputed=False)
    for part in ("weights", "gradients", "optimizer"):
        assert getattr(sharded, part) == getattr(plain, part) // 8
    assert sharded.activations == plain.activations
    alone = memory_per_device(recipe('[compute]\nstrategy = "fsdp"'), SHAPE, 1, 8, recomputed=False)
    assert alone == memory_per_device(recipe(), SHAPE, 1, 8, recomputed=False)
    kept = memory_per_device(recipe("[checkpoint]\nasynchronous = true"), SHAPE, 1, 8, False, on_gpu=False)
    assert kept.checkpoint == kept.weights + kept.optimizer
    assert plain.checkpoint == 0


def test_the_loss_makes_as_many_logits_at_a_time_as_the_plan_says() -> None:
    """What counts them needs no torch, so it has the numbers for itself."""
    assert (memory._LOSS_ROWS, memory._LOSS_LOGITS) == (loss.CHUNK_ROWS, loss.CHUNK_LOGITS)
    assert memory._LOSS_ROWS_ON_GPU == loss.CHUNK_ROWS_ON_GPU
