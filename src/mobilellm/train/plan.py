"""What a recipe would do, before anything starts: memory by part, tokens, FLOPs, days, bytes on disk.

Memory is counted (`memory.py`), not measured; `HEADROOM` stands for what comes on top.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from mobilellm.accounting import (
    SECONDS_PER_DAY,
    Parameters,
    executed_parameters,
    forward_flops_per_token,
    stored_parameters,
    training_flops_per_token,
)
from mobilellm.config import ModelConfig
from mobilellm.data.shards import read_index
from mobilellm.hardware import MEMORY_GB, named_peak_flops
from mobilellm.train.device import Device, this_device
from mobilellm.train.lora import adapter_parameters, flops_not_needed
from mobilellm.train.memory import Memory, checkpoint_bytes, memory_per_device, trained_parameters
from mobilellm.train.recipe import Recipe
from mobilellm.train.teacher_cost import Teaching

HEADROOM = 0.9
"""Share of a device's memory that what is counted may fill."""
GPU_MFU, CPU_MFU = 0.45, 0.3
"""Assumed shares of the peak: of a GPU's data sheet, and of what a bare matrix product reaches on a CPU."""


@dataclass(frozen=True)
class DataUse:
    folder: str
    tokens: int | None
    """None where there are no shards yet."""
    epochs: float | None


@dataclass(frozen=True)
class Pace:
    hardware: str
    devices: int
    peak_flops: float
    """Of one device."""
    mfu: float
    """Assumed; counts what the model needs, not what activation checkpointing computes again."""
    tokens_per_second: float
    """All devices together."""
    days: float
    memory_bytes: int | None
    """Of one device."""
    fits: bool | None
    """Whether what is counted leaves room there; None where its memory is not known."""


@dataclass(frozen=True)
class Plan:
    parameters: Parameters
    trained_parameters: int
    world_size: int
    strategy: str
    steps: int
    tokens_per_step: int
    tokens: int
    micro_batch: int
    """Sequences a device holds at once: the recipe's, or fewer when its share of a step is smaller."""
    micro_batches: int
    """Accumulated on each device for a step."""
    sequence_length: int
    data: tuple[DataUse, ...]
    flops_per_token: int
    """6N and causal attention."""
    flops: float
    """Of the training; a teacher's come on top."""
    teaching: Teaching | None
    rounds_weights: bool
    """Whether weights are rounded once a step (`[qat]`), whose time is not counted."""
    device: Device
    activation_checkpointing: bool
    memory: Memory
    memory_otherwise: Memory
    """With activation checkpointing the other way."""
    paces: tuple[Pace, ...]
    """On this machine, then on named hardware."""
    checkpoint_bytes: int
    checkpoints_kept: int
    """At most, with milestones and the one being written."""


def make_plan(
    recipe: Recipe,
    config: ModelConfig,
    world_size: int = 1,
    device: Device | None = None,
    hardware: Sequence[str] = ("a100", "h100", "h200"),
    teaching: Teaching | None = None,
) -> Plan:
    """The plan of `recipe` with a model of `config` on `world_size` devices, this machine's if not told.

    `teaching` is what a distillation has a teacher do before.

    Raises ValueError for hardware that is not known and a batch that the devices cannot share evenly.
    """
    batch, compute = recipe.batch, recipe.compute
    if world_size < 1:
        raise ValueError(f"train: devices = {world_size} must be at least 1")
    batch.check(config.max_position_embeddings, world_size)
    share = batch.sequences_per_step // world_size
    peaks = {name: named_peak_flops(name) for name in hardware}
    device = device or this_device(compute.precision)
    micro_batch = min(batch.micro_batch, share)
    flops_per_token = training_flops_per_token(config, batch.sequence_length)
    if recipe.lora is not None:
        flops_per_token -= flops_not_needed(recipe.lora, config)
    kept = recipe.checkpoint.keep_last + 1
    if recipe.checkpoint.milestone_every:
        kept += recipe.steps // recipe.checkpoint.milestone_every
    memory, other = (
        memory_per_device(
            recipe, config, world_size, micro_batch, recomputed, device.is_gpu, device.has_kernels
        )
        for recomputed in (compute.activation_checkpointing, not compute.activation_checkpointing)
    )
    work = flops_per_token + _recomputed(recipe, config)
    before = 0.0 if teaching is None else teaching.flops
    beside = 0 if teaching is None else teaching.memory_bytes

    def pace(name: str, devices: int, peak: float, mfu: float, available: int | None, needed: int) -> Pace:
        rate = devices * peak * mfu / work
        fits = None if available is None else needed <= HEADROOM * available
        seconds = recipe.total_tokens / rate + before / (devices * peak * mfu)
        days = seconds / SECONDS_PER_DAY
        return Pace(name, devices, peak, mfu, rate, days, available, fits)

    if device.is_gpu:
        needed = max(memory.total, memory.weights + beside)
        here = pace(device.name, world_size, device.peak_flops, GPU_MFU, device.memory_bytes, needed)
    else:  # processes on a CPU share its cores and its memory
        needed = max(memory.total, memory.weights + beside) * world_size
        here = pace(device.name, 1, device.peak_flops, CPU_MFU, device.memory_bytes, needed)
    there = memory_per_device(
        recipe, config, world_size, micro_batch, compute.activation_checkpointing, on_gpu=True
    )
    on_gpu = max(there.total, there.weights + beside)
    named = (
        pace(name, world_size, peak, GPU_MFU, MEMORY_GB[name.lower()] * 10**9, on_gpu)
        for name, peak in peaks.items()
    )
    return Plan(
        parameters=stored_parameters(config),
        trained_parameters=trained_parameters(recipe, config),
        world_size=world_size,
        strategy=compute.strategy,
        steps=recipe.steps,
        tokens_per_step=batch.tokens_per_step,
        tokens=recipe.total_tokens,
        micro_batch=micro_batch,
        micro_batches=math.ceil(share / micro_batch),
        sequence_length=batch.sequence_length,
        data=_data_use(recipe),
        flops_per_token=flops_per_token,
        flops=float(flops_per_token) * recipe.total_tokens,
        teaching=teaching,
        rounds_weights=recipe.qat is not None,
        device=device,
        activation_checkpointing=compute.activation_checkpointing,
        memory=memory,
        memory_otherwise=other,
        paces=(here, *named),
        checkpoint_bytes=checkpoint_bytes(recipe, config),
        checkpoints_kept=min(kept, recipe.steps // recipe.checkpoint.every + 2),
    )


def _recomputed(recipe: Recipe, config: ModelConfig) -> int:
    """FLOPs a token beyond what the model needs: the blocks' forward pass once more."""
    if not recipe.compute.activation_checkpointing:
        return 0
    forward = forward_flops_per_token(config, recipe.batch.sequence_length)
    adapters = 0 if recipe.lora is None else 2 * config.repeats * adapter_parameters(recipe.lora, config)
    return forward - 2 * executed_parameters(config).head + adapters


def _data_use(recipe: Recipe) -> tuple[DataUse, ...]:
    """Epochs over each folder: its share of the tokens by what it holds."""
    counts = [
        read_index(folder).total("train", "tokens") if (folder / "index.json").is_file() else None
        for folder in recipe.data.train
    ]
    shares = recipe.data.weights or tuple(float(count or 0) for count in counts)
    whole = sum(shares)
    known = bool(recipe.data.weights) or None not in counts
    return tuple(
        DataUse(str(folder), count, recipe.total_tokens * share / whole / count if known and count else None)
        for folder, count, share in zip(recipe.data.train, counts, shares, strict=True)
    )
