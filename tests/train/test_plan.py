"""A plan's numbers against what training really holds, writes and takes."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from mobilellm.accounting import SECONDS_PER_DAY, stored_parameters, training_flops_per_token
from mobilellm.config import ModelConfig
from mobilellm.data.documents import Document
from mobilellm.data.loader import PackedLoader
from mobilellm.data.shards import write_shards
from mobilellm.model.transformer import MobileLLM
from mobilellm.presets import preset
from mobilellm.tokenizer import Tokenizer
from mobilellm.train import plan
from mobilellm.train.checkpoint_files import checkpoints
from mobilellm.train.device import Device
from mobilellm.train.loop import train
from mobilellm.train.plan import make_plan
from mobilellm.train.recipe import Recipe, parse_recipe

GPU = Device("a GPU", 80 * 10**9, 1e15, "given", is_gpu=True)
SHAPE = ModelConfig(
    vocab_size=300,
    hidden_size=96,
    intermediate_size=200,
    num_layers=3,
    num_heads=4,
    num_kv_heads=2,
    head_dim=32,
    max_position_embeddings=128,
)


def recipe(text: str = "", folder: str = "nowhere", **batch: int) -> Recipe:
    sizes = {"tokens_per_step": 4096, "sequence_length": 64, "micro_batch": 4} | batch
    lines = "\n".join(f"{name} = {value}" for name, value in sizes.items())
    return parse_recipe(
        f'steps = 100\n[model]\npreset = "test"\n[data]\ntrain = ["{folder}"]\n[batch]\n{lines}\n{text}',
        "here",
    )


def test_bytes_on_disk(tmp_path: Path) -> None:
    """A checkpoint is as large as planned, but for its headers and indices."""
    made = replace(recipe(tokens_per_step=128, micro_batch=2), steps=2)
    planned = make_plan(made, SHAPE, device=GPU)
    loader = PackedLoader([torch.arange(2000).numpy() % 300], 64, 2, 0)
    train(MobileLLM(SHAPE), loader, made, tmp_path)
    (path,) = checkpoints(tmp_path / "checkpoints")
    written = sum(file.stat().st_size for file in path.iterdir())
    assert planned.checkpoint_bytes == pytest.approx(written, rel=0.05)


def test_counts_of_a_step() -> None:
    plan = make_plan(recipe(micro_batch=6), SHAPE, 4, GPU)  # 64 sequences a step, 16 a device
    assert (plan.steps, plan.tokens, plan.micro_batch, plan.micro_batches) == (100, 409_600, 6, 3)
    large = make_plan(recipe(micro_batch=99), SHAPE, 4, GPU)
    assert (large.micro_batch, large.micro_batches) == (16, 1)
    assert plan.flops == 409_600 * training_flops_per_token(SHAPE, 64)
    assert plan.parameters == stored_parameters(SHAPE)


def test_time_follows_from_peak_and_mfu() -> None:
    plan = make_plan(recipe(), SHAPE, 8, GPU, hardware=("a100", "H200"))
    assert [(pace.hardware, pace.devices, pace.peak_flops) for pace in plan.paces] == [
        ("a GPU", 8, 1e15), ("a100", 8, 312e12), ("H200", 8, 989e12),
    ]  # fmt: skip
    for pace in plan.paces:
        assert pace.days * SECONDS_PER_DAY * pace.tokens_per_second == pytest.approx(plan.tokens)
        rate = pace.peak_flops * pace.mfu * 8 / plan.flops_per_token
        assert pace.tokens_per_second == pytest.approx(rate)
    again = make_plan(recipe("[compute]\nactivation_checkpointing = true"), SHAPE, 8, GPU)
    assert again.flops == plan.flops
    assert plan.paces[0].days < again.paces[0].days < 4 / 3 * plan.paces[0].days
    assert again.memory == plan.memory_otherwise
    assert again.memory_otherwise == plan.memory


def test_whether_it_fits() -> None:
    needed = make_plan(recipe(), SHAPE, 1, GPU).memory.total
    for memory, fits in ((None, None), (needed, False), (math.ceil(needed / 0.9) + 1, True)):
        (here, *_) = make_plan(recipe(), SHAPE, 1, replace(GPU, memory_bytes=memory)).paces
        assert here.fits is fits
    cpu = Device("a CPU", None, 1e11, "given", is_gpu=False)
    needed = make_plan(recipe(), SHAPE, 1, cpu).memory.total
    cpu = replace(cpu, memory_bytes=math.ceil(needed / 0.9) + 1)
    assert make_plan(recipe(), SHAPE, 1, cpu).paces[0].fits
    shared = make_plan(recipe(), SHAPE, 2, cpu)
    assert not shared.paces[0].fits  # two processes, one memory
    assert shared.paces[0].devices == 1
    assert shared.paces[1].fits


def test_epochs_over_the_data(tmp_path: Path) -> None:
    tokenizer = Tokenizer.train(["some words to learn from, again and again"] * 20, 300)
    folders = [tmp_path / "a", tmp_path / "b"]
    counts = []
    for folder, repeat in zip(folders, (40, 120), strict=True):
        documents = [Document(f"{i} words " * repeat, str(i)) for i in range(20)]
        counts.append(write_shards(folder, documents, tokenizer, "here", "mine").total("train", "tokens"))
    made = recipe()
    tokens = made.total_tokens

    def use(**data: Any) -> list[tuple[int | None, float | None]]:
        chosen = replace(made, data=replace(made.data, **data))
        return [(each.tokens, each.epochs) for each in make_plan(chosen, SHAPE, 1, GPU).data]

    together = tokens / sum(counts)
    assert use(train=(folders[0],)) == [(counts[0], pytest.approx(tokens / counts[0]))]
    assert use(train=tuple(folders)) == [(count, pytest.approx(together)) for count in counts]
    weighted = use(train=tuple(folders), weights=(3.0, 1.0))
    assert weighted == [
        (count, pytest.approx(tokens * share / count))
        for count, share in zip(counts, (0.75, 0.25), strict=True)
    ]
    assert use(train=(folders[0], tmp_path / "none")) == [(counts[0], None), (None, None)]
    assert [each.folder for each in make_plan(made, SHAPE, 1, GPU).data] == ["nowhere"]


def test_refusals() -> None:
    with pytest.raises(ValueError, match="64 sequences, which 3 devices cannot share evenly"):
        make_plan(recipe(), SHAPE, 3, GPU)
    with pytest.raises(ValueError, match="devices = 0 must be at least 1"):
        make_plan(recipe(), SHAPE, 0, GPU)
    with pytest.raises(ValueError, match="sequence_length = 64 is longer than the model's context of 32"):
        make_plan(recipe(), replace(SHAPE, max_position_embeddings=32), 1, GPU)
    with pytest.raises(ValueError, match="hardware 'abacus' is not known"):
        make_plan(recipe(), SHAPE, 1, GPU, hardware=("abacus",))


def test_the_published_cost() -> None:
    """MobileLLM-125M at the card's own MFU (37 %) takes the card's 3 days on 32 A100."""
    made = parse_recipe(
        'steps = 480000\n[model]\npreset = "125m"\n[data]\ntrain = ["x"]\n[batch]\n'
        "tokens_per_step = 2097152\nsequence_length = 2048\nmicro_batch = 32\n", "here",
    )  # fmt: skip
    pace = make_plan(made, preset("125m"), 32, GPU, ("a100",)).paces[1]
    assert pace.days * pace.mfu / 0.3709 == pytest.approx(3 * 1.0066, rel=0.01)


def test_a_plan_is_for_this_machine_where_nothing_else_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(plan, "this_device", lambda precision: asked.append(precision) or GPU)
    assert make_plan(recipe(), SHAPE) == make_plan(recipe(), SHAPE, device=GPU)
    assert asked == [recipe().compute.precision]
