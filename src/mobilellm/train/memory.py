"""What a run holds on one device, counted part by part, not measured.

What stays for the whole run, plus what a micro-batch holds at its peak, which is when the loss is computed.
Kernels' workspaces, fragmentation and the driver's own memory come on top.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

from mobilellm.accounting import stored_parameters
from mobilellm.config import ModelConfig
from mobilellm.train.distillation import DistillChoice
from mobilellm.train.lora import adapter_parameters, kept_bytes
from mobilellm.train.recipe import Recipe
from mobilellm.train.teacher_cache import place_bytes

_LOSS_ROWS, _LOSS_LOGITS = 512, 2**21
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
    if recipe.qat is not None:
        copies += 4 * (blocks + stored.embedding + stored.head)
    a_block = block_activation_bytes(config, width, compute.compile)
    kept = 4 * config.hidden_size * config.num_steps + a_block if recomputed else a_block * config.num_steps
    aside = recipe.checkpoint.asynchronous and not on_gpu
    rows = min(tokens, max(_LOSS_ROWS, _LOSS_LOGITS // config.vocab_size))
    loss = (
        rows * config.vocab_size * (2 * width + 4)  # logits, their softmax in float32, their gradient
        + tokens * config.hidden_size * (2 * width + 4)  # hidden states, and their gradient twice
        + vocabulary * (4 + (2 * width if width == 2 else width))  # gradient of the head, and of a chunk
    )
    weights, trained = 4 * stored.total, trained_parameters(recipe, config)
    if recipe.lora is not None:
        weights += 4 * trained
        if is_narrow(recipe, on_gpu):
            weights, copies = weights - 2 * blocks, 0
        kept += config.num_steps * kept_bytes(recipe.lora, config)
        loss -= vocabulary * (4 + (2 * width if width == 2 else width))
    if recipe.distill is not None:
        loss += rows * taught_bytes(recipe.distill, config, in_place=width == 2 and not on_gpu)
    return Memory(
        weights=weights // sharded,
        gradients=4 * trained // sharded,
        optimizer=_optimizer_bytes(recipe, config) // sharded,
        copies=copies,
        activations=tokens * (kept + 8 * config.hidden_size),  # and the final norm's
        loss=loss,
        checkpoint=checkpoint_bytes(recipe, config) // sharded if aside else 0,
        batches=_batch_bytes(recipe, config) // world_size * (1 if on_gpu else _AHEAD),
    )


def is_narrow(recipe: Recipe, on_gpu: bool) -> bool:
    """Whether the frozen matrices beside adapters are held in bfloat16 (`model.adapters.narrow`).

    What the modules of peft compute, not our own way through the blocks, wants the norms of exact rows.
    """
    lora, compute = recipe.lora, recipe.compute
    exact = compute.compile or (lora is not None and lora.dora and lora.dropout > 0)
    return lora is not None and compute.precision == "bfloat16" and not on_gpu and not exact


def taught_bytes(distill: DistillChoice, config: ModelConfig, in_place: bool) -> int:
    """Bytes a token beyond what cross-entropy takes: the teacher's tokens, and in plain torch, which does not
    compute `in_place`, logits at the temperature and with those tokens left out (`_Student`)."""
    named = distill.top_k * (8 + 3 * 4) + 8  # ids, probabilities as stored and as shares, the student's
    softened = 0 if distill.temperature == 1 else 8
    return named if in_place else named + config.vocab_size * (4 + softened)


def _batch_bytes(recipe: Recipe, config: ModelConfig) -> int:
    """Of a whole step."""
    a_token = 8 + 8 + 4
    if recipe.chat is not None or recipe.data.document_mask:
        a_token += 4  # segments
    if recipe.distill is not None:
        a_token += place_bytes(config.vocab_size, recipe.distill.top_k)
    return recipe.batch.tokens_per_step * a_token


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
