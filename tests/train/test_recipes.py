"""Every recipe of the package: parsed, the paper's values, planned, and one real step of its shape, shrunk."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from mobilellm.accounting import stored_parameters
from mobilellm.config import ModelConfig
from mobilellm.data.loader import PackedLoader
from mobilellm.model.transformer import MobileLLM
from mobilellm.presets import preset
from mobilellm.train.checkpoint_files import checkpoints
from mobilellm.train.loop import train
from mobilellm.train.metrics import read_metrics
from mobilellm.train.plan import Device, make_plan
from mobilellm.train.recipe import Recipe, load_recipe, parse_recipe, recipe_names, to_toml, with_steps

PARAMETERS = {
    "pretrain-125m": 124_635_456,
    "pretrain-350m": 345_355_200,
    "pretrain-600m": 603_188_352,
    "pretrain-1b": 1_005_461_760,
    "pretrain-1.5b": 1_511_188_800,
    "pretrain-125m-ls": 124_635_456,
    "pretrain-350m-ls": 345_355_200,
}
"""Of the paper's table 9, embedding and head shared."""
PRETRAINING = sorted(PARAMETERS)
FINETUNING = ["api-calling", "qat-cpu", "sft", "sft-cpu"]
CARD = Device("80 GB", 80 * 10**9, 312e12, "given", is_gpu=True)


def test_all_are_here() -> None:
    assert set(recipe_names()) == {"tiny-cpu", "hour-cpu", "distill-cpu", *FINETUNING, *PARAMETERS}


@pytest.mark.parametrize("name", [*PRETRAINING, *FINETUNING, "tiny-cpu", "hour-cpu", "distill-cpu"])
def test_it_is_parsed_and_comes_back(name: str) -> None:
    recipe = load_recipe(name)
    assert parse_recipe(to_toml(recipe), "again") == recipe


@pytest.mark.parametrize("name", PRETRAINING)
def test_the_published_model_and_training(name: str) -> None:
    recipe = load_recipe(name)
    config = recipe.model.config()
    assert stored_parameters(config).total == PARAMETERS[name]
    assert config.repeats == (2 if name.endswith("-ls") else 1)
    assert (config.vocab_size, config.max_position_embeddings) == (32_000, 2048)
    assert recipe.batch.tokens_per_step == 1024 * 2048
    assert recipe.batch.sequence_length == 2048
    assert recipe.total_tokens == pytest.approx(1.0066e12, rel=1e-4)
    optim, schedule = recipe.optim, recipe.schedule
    assert (optim.name, optim.lr, optim.beta1, optim.beta2) == ("adamw", 2e-3, 0.9, 0.95)
    assert (optim.epsilon, optim.weight_decay, optim.clip_norm) == (1e-8, 0.1, 1.0)
    assert (schedule.name, schedule.warmup_steps, schedule.final_fraction) == ("cosine", 1000, 0.1)
    assert recipe.compute.precision == "bfloat16"
    assert recipe.compute.compile
    assert recipe.checkpoint.asynchronous


def test_the_published_fine_tuning_for_api_calling() -> None:
    """Paper, section 4.3: 4 epochs, Adam, 2e-5 with linear decay, weight decay 0.01."""
    recipe = load_recipe("api-calling")
    assert (recipe.epochs, recipe.steps) == (4, 0)
    assert (recipe.optim.name, recipe.optim.lr, recipe.optim.weight_decay) == ("adamw", 2e-5, 0.01)
    assert (recipe.schedule.name, recipe.schedule.final_fraction) == ("linear", 0)


def test_fine_tuning_for_the_published_sizes_fits_an_80_gb_card() -> None:
    recipe = with_steps(load_recipe("sft"), 1000)
    assert recipe.steps == math.ceil(3 * 1000 / 32)
    for size in ("125m", "ls-350m", "1b", "1.5b"):
        assert make_plan(recipe, preset(size), 1, CARD).paces[0].fits


@pytest.mark.parametrize(
    ("epochs", "steps", "sequences", "settled"),
    [(3, 0, 10, 8), (3, 5, 10, 5), (3, 500, 10, 8), (0.1, 0, 10, 1), (0, 7, 10, 7), (2.5, 0, 16, 10)],
)
def test_steps_follow_from_epochs(epochs: float, steps: int, sequences: int, settled: int) -> None:
    recipe = load_recipe("sft-cpu")
    batch = replace(recipe.batch, tokens_per_step=4 * 512, sequence_length=512)
    recipe = replace(recipe, epochs=epochs, steps=steps, batch=batch)
    assert with_steps(recipe, sequences).steps == settled


@pytest.mark.parametrize("name", PRETRAINING)
def test_it_fits_an_80_gb_card(name: str) -> None:
    """On 1 to 1024 devices, and not by wasting half of the card."""
    recipe = load_recipe(name)
    for devices in (1, 8, 32, 256, 1024):
        plan = make_plan(recipe, recipe.model.config(), devices, CARD)
        assert plan.paces[0].fits
        assert plan.micro_batch * plan.micro_batches * devices == 1024
    double = replace(recipe, batch=replace(recipe.batch, micro_batch=4 * recipe.batch.micro_batch))
    larger = make_plan(double, recipe.model.config(), 1, CARD)
    assert not larger.paces[0].fits


def shrunk(recipe: Recipe) -> Recipe:
    """As many heads, the same ratios; heads of 8 instead of 64, two blocks, a batch of 8 short sequences."""
    config = recipe.model.config()
    width = config.hidden_size * 8 // config.head_dim
    model = replace(
        recipe.model,
        vocab_size=64,
        head_dim=8,
        hidden_size=width,
        intermediate_size=config.intermediate_size * width // config.hidden_size,
        num_layers=2,
        max_position_embeddings=32,
    )
    batch = replace(recipe.batch, tokens_per_step=8 * 16, sequence_length=16, micro_batch=4)
    return replace(recipe, model=model, batch=batch, steps=1, compute=replace(recipe.compute, compile=False))


@pytest.mark.parametrize("name", [*PRETRAINING, "tiny-cpu", "hour-cpu"])
def test_one_step_of_it(name: str, tmp_path: Path) -> None:
    original, recipe = load_recipe(name), shrunk(load_recipe(name))
    config: ModelConfig = recipe.model.config()
    published = original.model.config()
    assert (config.num_heads, config.num_kv_heads, config.repeats) == (
        published.num_heads, published.num_kv_heads, published.repeats
    )  # fmt: skip
    model = MobileLLM(config, torch.Generator().manual_seed(recipe.seed))
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    stream = np.random.default_rng(0).integers(0, 64, 500)
    loader = PackedLoader([stream], 16, recipe.batch.sequences_per_step, recipe.seed)
    outcome = train(model, loader, recipe, tmp_path)
    assert outcome.steps == 1
    (record,) = read_metrics(tmp_path / "metrics.jsonl")
    assert record["loss"] == pytest.approx(math.log(64), abs=0.5)
    assert record["learning_rate"] == pytest.approx(recipe.optim.lr / recipe.schedule.warmup_steps)
    assert record["tokens"] == 128
    assert math.isfinite(record["gradient_norm"])
    assert record["gradient_norm"] > 0
    moved = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
    assert {name for name in before if before[name].ndim == 2} <= moved
    assert [path.name for path in checkpoints(tmp_path / "checkpoints")] == ["step-00000001"]
