"""What a run holds on one device, counted part by part, not measured.

What stays for the whole run, plus what a micro-batch holds at its peak, which is when the loss is computed.
Kernels' workspaces, fragmentation and the driver's own memory come on top.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import NamedTuple

from mobilellm.accounting import stored_parameters
from mobilellm.config import ModelConfig
from mobilellm.train.activations import adapted_bytes, adapted_copies, kernel_bytes, plain_bytes
from mobilellm.train.distillation import DistillChoice
from mobilellm.train.lora import adapter_parameters
from mobilellm.train.recipe import Recipe
from mobilellm.train.teacher_cache import place_bytes

_LOSS_ROWS, _LOSS_LOGITS, _LOSS_ROWS_ON_GPU = 512, 2**21, 4096
"""The loss makes logits for this many tokens at a time: at least so many, or so many logits."""
_AHEAD = 4
"""Batches in memory: the one in use, and those that `feed.Feed` has ready or in hand."""


@dataclass(frozen=True)
class Memory:
    """Bytes on one device."""

    weights: int
    gradients: int
    optimizer: int
    copies: int
    """Weights in bfloat16 that autocast makes; with fsdp the gathered weights of two blocks and the head. Of
    qat: the rounded weights in float32."""
    activations: int
    """What the forward pass of a micro-batch keeps for the backward pass."""
    loss: int
    """Logits of a chunk of tokens, and the gradients that the loss makes beside them."""
    checkpoint: int
    """What an asynchronous checkpoint is written from; that of a GPU lies in the machine's memory."""
    batches: int
    """This device's share of a step: tokens, targets, weights, and what a teacher says; on a CPU the ones
    that are read ahead, too."""
    merged: int
    """Beside adapters: matrices in float32 that they are folded into for an evaluation, beyond what a step
    holds that an evaluation does not."""

    @property
    def total(self) -> int:
        return sum(asdict(self).values())


def memory_per_device(
    recipe: Recipe,
    config: ModelConfig,
    world_size: int,
    micro_batch: int,
    recomputed: bool,
    on_gpu: bool = True,
    by_kernels: bool = False,
) -> Memory:
    """Bytes of each part, with activation checkpointing if `recomputed`.

    `by_kernels`: on a CPU that has compiled the kernels for training, which run where `takes_kernels`.
    """
    compute, stored, lora = recipe.compute, stored_parameters(config), recipe.lora
    width = 2 if compute.precision == "bfloat16" else 4
    tokens = micro_batch * recipe.batch.sequence_length
    sharded = world_size if compute.strategy == "fsdp" else 1
    vocabulary = config.vocab_size * config.hidden_size
    trained, fast = trained_parameters(recipe, config), by_kernels and takes_kernels(recipe)
    blocks = _blocks(recipe, config, width, on_gpu, fast)
    copies, kept = blocks.copies, blocks.kept * config.num_steps
    if sharded > 1:
        of_blocks = stored.attention + stored.ffn
        copies = width * (2 * of_blocks // config.num_layers + stored.embedding + stored.head)
    if recipe.qat is not None:
        copies += 4 * stored.matrices
    if recomputed:
        kept = 4 * config.hidden_size * config.num_steps + blocks.kept
    rows = min(tokens, _LOSS_ROWS_ON_GPU if on_gpu else max(_LOSS_ROWS, _LOSS_LOGITS // config.vocab_size))
    loss = (
        rows * config.vocab_size * (2 if fast else 2 * width + 4)  # logits, softmax in float32, gradient
        + tokens * config.hidden_size * (2 * width + 4)  # hidden states, and their gradient twice
    )
    if lora is None:
        loss += vocabulary * (4 + (2 * width if width == 2 else width))  # head's gradient, and of a chunk
    if recipe.distill is not None:
        loss += rows * taught_bytes(recipe.distill, config, in_place=fast)
    weights = 4 * stored.total
    if lora is not None:
        weights += 4 * trained - (2 * (stored.attention + stored.ffn) if fast else 0)  # `adapters.narrow`
    aside = recipe.checkpoint.asynchronous and not on_gpu
    activations = tokens * (kept + blocks.last)
    folded = 0 if lora is None else 4 * (stored.attention + stored.ffn)
    return Memory(
        weights=weights // sharded,
        gradients=_gradient_bytes(recipe, config, world_size, micro_batch, fast) // sharded,
        optimizer=_optimizer_bytes(recipe, config) // sharded,
        copies=copies,
        activations=activations,
        loss=loss,
        checkpoint=checkpoint_bytes(recipe, config) // sharded if aside else 0,
        batches=_batch_bytes(recipe, config) // world_size * (1 if on_gpu else _AHEAD),
        merged=max(0, folded - activations - loss),
    )


class _Blocks(NamedTuple):
    kept: int
    """Bytes of a token, of one executed block."""
    last: int
    """Of the final norm."""
    copies: int
    """Of weights, of all blocks."""


def _blocks(recipe: Recipe, config: ModelConfig, width: int, on_gpu: bool, fast: bool) -> _Blocks:
    """By the way that training takes through the blocks."""
    lora, compiled, E = recipe.lora, recipe.compute.compile, config.hidden_size
    if fast:
        return _Blocks(kernel_bytes(config, lora), 2 * E + 12, 0)
    if lora is not None and not compiled:
        copies = adapted_copies(config, lora, width)
        return _Blocks(adapted_bytes(config, lora, width, on_gpu), 8 * E, copies)
    kept = plain_bytes(config, width, compiled)
    kept += 0 if lora is None else width * lora.rank * len(lora.targets)
    # Autocast keeps one copy of each weight; a compiled block makes and keeps its own whenever it runs.
    stored = stored_parameters(config)
    copies = 2 * (stored.attention + stored.ffn) * (config.repeats if compiled else 1) if width == 2 else 0
    return _Blocks(kept, 8 * E, copies)


def takes_kernels(recipe: Recipe) -> bool:
    """Whether a CPU with the kernels for training goes its own way through the blocks; frozen matrices beside
    adapters are then held in bfloat16. DoRA with dropout goes by the modules of peft."""
    lora, compute = recipe.lora, recipe.compute
    by_peft = lora is not None and lora.dora and lora.dropout > 0
    return compute.precision == "bfloat16" and not compute.compile and not by_peft


def taught_bytes(distill: DistillChoice, config: ModelConfig, in_place: bool) -> int:
    """Bytes a token beyond what cross-entropy takes: the teacher's tokens, and in plain torch, which does not
    compute `in_place`, logits at the temperature and with those tokens left out (`_Student`)."""
    named = distill.top_k * (8 + 3 * 4) + 8  # ids, probabilities as stored and as shares, the student's
    softened = 0 if distill.temperature == 1 else 8
    return named if in_place else named + config.vocab_size * (4 + softened)


def _gradient_bytes(
    recipe: Recipe, config: ModelConfig, world_size: int, micro_batch: int, fast: bool
) -> int:
    """Of all that is trained, in float32; of matrices in bfloat16 where `train/lean.py` does so."""
    once = world_size == 1 and recipe.batch.sequences_per_step <= micro_batch
    trained = trained_parameters(recipe, config)
    if fast and once and recipe.lora is None and recipe.optim.name == "adamw":
        return 4 * trained - 2 * stored_parameters(config).matrices
    return 4 * trained


def _batch_bytes(recipe: Recipe, config: ModelConfig) -> int:
    """Of a whole step."""
    a_token = 8 + 8 + 4
    if recipe.chat is not None or recipe.data.document_mask:
        a_token += 4  # segments
    if recipe.distill is not None:
        a_token += place_bytes(config.vocab_size, recipe.distill.top_k)
    return recipe.batch.tokens_per_step * a_token


def checkpoint_bytes(recipe: Recipe, config: ModelConfig) -> int:
    """What is trained and the optimiser, all in float32."""
    return 4 * trained_parameters(recipe, config) + _optimizer_bytes(recipe, config)


def trained_parameters(recipe: Recipe, config: ModelConfig) -> int:
    """All weights, or those of the adapters."""
    if recipe.lora is not None:
        return adapter_parameters(recipe.lora, config)
    return stored_parameters(config).total


def _optimizer_bytes(recipe: Recipe, config: ModelConfig) -> int:
    """AdamW's two moments of every weight that is trained; Muon has one of the blocks' matrices."""
    stored = stored_parameters(config)
    muon = stored.attention + stored.ffn if recipe.optim.name == "muon" else 0
    return 8 * trained_parameters(recipe, config) - 4 * muon
