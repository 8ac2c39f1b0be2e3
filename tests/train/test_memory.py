"""Memory as it is planned against what training really holds."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from test_plan import GPU, SHAPE, recipe

from mobilellm.config import ModelConfig
from mobilellm.model.transformer import MobileLLM
from mobilellm.train import loss, memory
from mobilellm.train.memory import memory_per_device
from mobilellm.train.optim import build_optimizer
from mobilellm.train.plan import make_plan


def saved_bytes(config: ModelConfig, batch: int, length: int, bf16: bool, compiled: bool) -> int:
    """What autograd keeps of a forward pass through all blocks, weights themselves left out."""
    model = MobileLLM(config, torch.Generator().manual_seed(0))
    if compiled:
        for block in model.model.layers:  # the partitioner of torch.compile, without its C++
            block.compile(backend="aot_eager_decomp_partition")
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, tuple[int, torch.Tensor]] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = (storage.nbytes(), tensor)  # alive, or its address would come again
        return tensor

    tokens = torch.randint(config.vocab_size, (batch, length))
    with (
        torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
        torch.autocast("cpu", torch.bfloat16, bf16),
    ):
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
    measured = saved_bytes(config, 4, 64, precision == "bfloat16", compiled)
    assert planned.activations + planned.copies == pytest.approx(measured, rel=0.05)
    assert (planned.copies > 0) == (precision == "bfloat16")


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

    def size(tensors: Any) -> int:
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)

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
