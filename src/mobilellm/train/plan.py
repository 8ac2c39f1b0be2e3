"""What a recipe would do, before anything starts: memory by part, tokens, FLOPs, days, bytes on disk.

Memory is counted, not measured: what stays for the whole run, plus what a micro-batch holds at its peak,
which is when the loss is computed. Kernels' workspaces, fragmentation and the driver's own memory come on
top; `HEADROOM` stands for them.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

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
from mobilellm.hardware import MEMORY_GB, named_peak_flops, peak_flops
from mobilellm.train.recipe import Recipe

if TYPE_CHECKING:
    import torch

HEADROOM = 0.9
"""Share of a device's memory that what is counted may fill."""
GPU_MFU, CPU_MFU = 0.45, 0.3
"""Assumed shares of the peak: of a GPU's data sheet, and of what a bare matrix product reaches on a CPU."""
_LOSS_ROWS, _LOSS_LOGITS = 512, 2**21
"""The loss makes logits for this many tokens at a time: at least so many, or so many logits."""


@dataclass(frozen=True)
class Device:
    name: str
    memory_bytes: int | None
    peak_flops: float
    """Of one device, or of the whole CPU whatever the number of processes on it."""
    peak_source: str
    is_gpu: bool


@dataclass(frozen=True)
class Memory:
    """Bytes on one device."""

    weights: int
    gradients: int
    optimizer: int
    copies: int
    """Weights in bfloat16 that autocast makes; with fsdp the gathered weights of two blocks and the head."""
    activations: int
    """What the forward pass of a micro-batch keeps for the backward pass."""
    loss: int
    """Logits of a chunk of tokens, and the gradients that the loss makes beside them."""
    checkpoint: int
    """What an asynchronous checkpoint is written from; that of a GPU lies in the machine's memory."""

    @property
    def total(self) -> int:
        return sum(asdict(self).values())


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
) -> Plan:
    """The plan of `recipe` with a model of `config` on `world_size` devices, this machine's if not told.

    Raises ValueError for hardware that is not known and a batch that the devices cannot share evenly.
    """
    batch, compute = recipe.batch, recipe.compute
    if world_size < 1:
        raise ValueError(f"plan: devices = {world_size} must be at least 1")
    share, rest = divmod(batch.sequences_per_step, world_size)
    if rest:
        raise ValueError(
            f"plan: batch.tokens_per_step = {batch.tokens_per_step} makes {batch.sequences_per_step} "
            f"sequences, which {world_size} devices cannot share evenly"
        )
    if batch.sequence_length > config.max_position_embeddings:
        raise ValueError(
            f"plan: batch.sequence_length = {batch.sequence_length} is longer than the model's context of "
            f"{config.max_position_embeddings} (max_position_embeddings)"
        )
    peaks = {name: named_peak_flops(name) for name in hardware}
    device = device or this_device(compute.precision)
    micro_batch = min(batch.micro_batch, share)
    flops_per_token = training_flops_per_token(config, batch.sequence_length)
    kept = recipe.checkpoint.keep_last + 1
    if recipe.checkpoint.milestone_every:
        kept += recipe.steps // recipe.checkpoint.milestone_every
    memory, other = (
        memory_per_device(recipe, config, world_size, micro_batch, recomputed, device.is_gpu)
        for recomputed in (compute.activation_checkpointing, not compute.activation_checkpointing)
    )
    work = flops_per_token * _recomputation(recipe, config)

    def pace(name: str, devices: int, peak: float, mfu: float, available: int | None, needed: int) -> Pace:
        rate = devices * peak * mfu / work
        fits = None if available is None else needed <= HEADROOM * available
        days = recipe.total_tokens / rate / SECONDS_PER_DAY
        return Pace(name, devices, peak, mfu, rate, days, available, fits)

    if device.is_gpu:
        here = pace(device.name, world_size, device.peak_flops, GPU_MFU, device.memory_bytes, memory.total)
    else:  # processes on a CPU share its cores and its memory
        needed = memory.total * world_size
        here = pace(device.name, 1, device.peak_flops, CPU_MFU, device.memory_bytes, needed)
    on_gpu = memory_per_device(
        recipe, config, world_size, micro_batch, compute.activation_checkpointing, on_gpu=True
    ).total
    named = (
        pace(name, world_size, peak, GPU_MFU, MEMORY_GB[name.lower()] * 10**9, on_gpu)
        for name, peak in peaks.items()
    )
    return Plan(
        parameters=stored_parameters(config),
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
        device=device,
        activation_checkpointing=compute.activation_checkpointing,
        memory=memory,
        memory_otherwise=other,
        paces=(here, *named),
        checkpoint_bytes=_checkpoint_bytes(recipe, config),
        checkpoints_kept=min(kept, recipe.steps // recipe.checkpoint.every + 2),
    )


def memory_per_device(
    recipe: Recipe,
    config: ModelConfig,
    world_size: int,
    micro_batch: int,
    recomputed: bool,
    on_gpu: bool = True,
) -> Memory:
    """Bytes of each part, with activation checkpointing if `recomputed`."""
    compute, stored = recipe.compute, stored_parameters(config)
    width = 2 if compute.precision == "bfloat16" else 4
    tokens = micro_batch * recipe.batch.sequence_length
    sharded = world_size if compute.strategy == "fsdp" else 1
    blocks = stored.attention + stored.ffn
    vocabulary = config.vocab_size * config.hidden_size
    if sharded > 1:
        copies = width * (2 * blocks // config.num_layers + stored.embedding + stored.head)
    elif width == 4:
        copies = 0
    else:
        # Autocast keeps one copy of each weight; a compiled block makes and keeps its own whenever it runs.
        copies = 2 * blocks * (config.repeats if compute.compile else 1)
    a_block = block_activation_bytes(config, width, compute.compile)
    kept = 4 * config.hidden_size * config.num_steps + a_block if recomputed else a_block * config.num_steps
    aside = recipe.checkpoint.asynchronous and not on_gpu
    rows = min(tokens, max(_LOSS_ROWS, _LOSS_LOGITS // config.vocab_size))
    loss = (
        rows * config.vocab_size * (2 * width + 4)  # logits, their softmax in float32, their gradient
        + tokens * config.hidden_size * (2 * width + 4)  # hidden states, and their gradient twice
        + vocabulary * (4 + (2 * width if width == 2 else width))  # gradient of the head, and of a chunk
    )
    return Memory(
        weights=4 * stored.total // sharded,
        gradients=4 * stored.total // sharded,
        optimizer=_optimizer_bytes(recipe, config) // sharded,
        copies=copies,
        activations=tokens * (kept + 8 * config.hidden_size),  # and the final norm's
        loss=loss,
        checkpoint=_checkpoint_bytes(recipe, config) // sharded if aside else 0,
    )


def block_activation_bytes(config: ModelConfig, width: int, compiled: bool) -> int:
    """Bytes a token that one executed block keeps for the backward pass; `width` bytes a number in products.

    Counted from the operators: inputs of the matrix products, of SiLU and the product after it, queries,
    keys, values and output of attention, inputs of the norms in float32. Without the compiler each product
    keeps an input of its own in bfloat16, and a norm its normalised input too; the compiler keeps one of each
    and recomputes what is cheap.
    """
    E, F = config.hidden_size, config.intermediate_size
    queries, keys = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    attention = 2 * width * (queries + keys) + 4 * config.num_heads
    norms = 8  # a float32 a norm
    if compiled:
        return 4 * E + 3 * width * E + attention + 3 * width * F + norms
    inputs = 5 if width == 2 else 2  # in float32 q, k, v and gate, up share theirs
    return 16 * E + inputs * width * E + attention + 4 * width * F + norms


def this_device(precision: str = "bfloat16", seconds: float = 0.5) -> Device:
    """The device that training would use here. Its peak comes from the data sheet, or is measured."""
    import torch

    dtype = torch.bfloat16 if precision == "bfloat16" else torch.float32
    if torch.cuda.is_available():
        name = torch.cuda.get_device_name()
        memory = torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory
        if (peak := peak_flops(name)) is not None:
            return Device(name, memory, peak, "dense bf16, data sheet", is_gpu=True)
        peak = measured_flops(dtype, torch.device("cuda"), seconds)
        return Device(name, memory, peak, f"measured, {precision} matrix products", is_gpu=True)
    peak = measured_flops(dtype, torch.device("cpu"), seconds)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    name = f"CPU, {torch.get_num_threads()} threads"
    return Device(name, memory, peak, f"measured, {precision} matrix products", is_gpu=False)


def measured_flops(dtype: torch.dtype, device: torch.device, seconds: float = 0.5) -> float:
    """The best FLOP/s of a matrix product of 1,024 cubed (of 4,096 on a GPU) within `seconds`."""
    import torch

    size = 4096 if device.type == "cuda" else 1024
    left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    best, stop = math.inf, time.perf_counter() + seconds
    while best == math.inf or time.perf_counter() < stop:
        started = time.perf_counter()
        left @ right
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - started)
    return 2 * size**3 / best


def _recomputation(recipe: Recipe, config: ModelConfig) -> float:
    """How many times more there is to compute than the model needs: the blocks' forward pass once more."""
    if not recipe.compute.activation_checkpointing:
        return 1.0
    forward = forward_flops_per_token(config, recipe.batch.sequence_length)
    return 1 + (forward - 2 * executed_parameters(config).head) / (3 * forward)


def _optimizer_bytes(recipe: Recipe, config: ModelConfig) -> int:
    """AdamW's two moments of every weight; Muon has one of the blocks' matrices."""
    stored = stored_parameters(config)
    muon = stored.attention + stored.ffn if recipe.optim.name == "muon" else 0
    return 8 * stored.total - 4 * muon


def _checkpoint_bytes(recipe: Recipe, config: ModelConfig) -> int:
    """Weights and optimiser, all in float32."""
    return 4 * stored_parameters(config).total + _optimizer_bytes(recipe, config)


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
