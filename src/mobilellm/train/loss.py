"""Next-token cross-entropy of a batch, in one place for every kind of run.

N tokens of the batch, E hidden_size, V vocab_size.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor

from mobilellm.model import cpu_kernels
from mobilellm.model.cpu_kernels import Kernels
from mobilellm.model.products import Products, TorchProducts, products
from mobilellm.model.training import blocks_are_compiled, gradient_dtype, training_hidden
from mobilellm.model.transformer import MobileLLM, products_dtype

CHUNK_ROWS = 512
"""Tokens whose logits are held at a time, at least: fewer would touch the head's gradient too often."""
CHUNK_LOGITS = 2**21
"""With a small vocabulary more tokens go at a time, up to this many logits, which stay in a cache."""
CHUNK_ROWS_ON_GPU = 4096
"""Its caches hold no chunk anyway; every one reads and writes the head's gradient, which is as large as 1,000
rows of logits or more."""


def weighted_loss(
    model: MobileLLM,
    tokens: Tensor,
    targets: Tensor,
    weights: Tensor,
    *,
    segments: Tensor | None = None,
    z_loss: float = 0.0,
    activation_checkpointing: bool = False,
) -> Tensor:
    """Sum over the batch of weight * negative log-likelihood (nats), in float32.

    A sum, not a mean: the caller divides by the weight of the whole step, so that micro-batches and devices
    with unequal weights count by token (a mean of means would not). Every target must be a token id; where a
    target does not count its weight is 0. `segments` and `activation_checkpointing` as in `training_hidden`,
    `z_loss` as in `linear_cross_entropy`.
    """
    hidden, head = training_hidden(model, tokens, segments, activation_checkpointing)
    fused = hidden.device.type == "cuda" and blocks_are_compiled(model)
    return linear_cross_entropy(
        hidden.flatten(0, 1), head, targets.flatten(), weights.flatten(), z_loss, fused=fused
    )


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    weights: Tensor,
    z_loss: float = 0.0,
    *,
    fused: bool = False,
) -> Tensor:
    """Sum over N of weights * (nll + z_loss * logsumexp²) of logits hidden (N, E) @ weight (V, E) transposed.

    `z_loss` keeps logsumexp near zero (PaLM, arXiv 2204.02311, uses 1e-4). `weights` get no gradient. Logits
    and gradients as in `linear_loss`; `fused` compiles what lies between the products, which then reads
    the logits twice and writes them once.
    """
    return linear_loss(hidden, weight, CrossEntropy(targets, weights.float(), z_loss, fused))


class LossOfLogits(Protocol):
    """A loss that is a sum over tokens; `part` are the tokens that some logits (rows, V) belong to."""

    def value(self, logits: Tensor, part: slice) -> Tensor: ...

    def gradient(self, logits: Tensor, part: slice) -> tuple[Tensor, Tensor]:
        """The value and its gradient by the logits, in their dtype; may overwrite the logits."""


def linear_loss(hidden: Tensor, weight: Tensor, loss: LossOfLogits) -> Tensor:
    """`loss` of the logits hidden (N, E) @ weight (V, E) transposed.

    The logits never exist as a whole: they are made a chunk of tokens at a time, and where gradients are
    wanted those of `hidden` and `weight` are finished before the next chunk (the idea of Liger Kernel, Hsu et
    al. 2024, arXiv 2410.10989). Products run in autocast's dtype if it is on, softmax and sums in float32 (in
    float64 where the logits are). One backward pass only.
    """
    function: Any = _LinearLoss.apply
    total: Tensor = function(hidden, weight, loss, (products_dtype(hidden), gradient_dtype(weight)))
    return total


class _LinearLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        loss: LossOfLogits,
        dtypes: tuple[torch.dtype, torch.dtype],
    ) -> Tensor:
        wanted = ctx.needs_input_grad[:2]
        with torch.autocast(hidden.device.type, enabled=False):
            total, *gradients = _loss_and_gradients(hidden, weight, loss, dtypes, wanted)
        ctx.save_for_backward(*gradients)
        return total

    @staticmethod
    def backward(ctx: Any, factor: Tensor) -> tuple[Tensor | None, ...]:
        scaled = (None if part is None else part.mul_(factor) for part in ctx.saved_tensors)
        return (*scaled, None, None)


def _loss_and_gradients(
    hidden: Tensor,
    weight: Tensor,
    loss: LossOfLogits,
    dtypes: tuple[torch.dtype, torch.dtype],
    wanted: tuple[bool, bool],
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Loss and gradients; products in the first of `dtypes`, the gradient by weight in the second."""
    N, V = hidden.shape[0], weight.shape[0]
    rows = CHUNK_ROWS_ON_GPU if hidden.device.type == "cuda" else max(CHUNK_ROWS, CHUNK_LOGITS // V)
    dtype, kept_in = dtypes
    sums_in = torch.float64 if dtype == torch.float64 else torch.float32
    maker = _products(hidden.device, dtype)
    narrow, head = hidden.to(dtype), maker.operand(weight, dtype)
    total = torch.zeros((), device=hidden.device, dtype=sums_in)
    hidden_gradient = torch.empty_like(narrow) if wanted[0] else None
    weight_gradient: Tensor | None = None
    for start in range(0, N, rows):
        part = slice(start, start + rows)
        logits = maker.multiply(narrow[part], head.t())
        if any(wanted):
            chunk_loss, gradient = loss.gradient(logits, part)
            if hidden_gradient is not None:
                maker.multiply(gradient, head, hidden_gradient[part])
            if wanted[1]:
                several = rows < N  # are summed in float32
                product = maker.multiply(gradient.t(), narrow[part], sums_in if several else kept_in)
                weight_gradient = product if weight_gradient is None else weight_gradient.add_(product)
        else:
            chunk_loss = loss.value(logits, part)
        total = total + chunk_loss
    if hidden_gradient is not None:
        hidden_gradient = hidden_gradient.to(hidden.dtype)
    if weight_gradient is not None:
        weight_gradient = weight_gradient.to(kept_in)
    return total, hidden_gradient, weight_gradient


def _products(device: torch.device, dtype: torch.dtype) -> Products:
    kernels = loss_kernels(device, dtype)
    return TorchProducts() if kernels is None else products(kernels)


def loss_kernels(device: torch.device, dtype: torch.dtype) -> Kernels | None:
    """The C functions, where they are what handles logits of this dtype on this device."""
    if device.type != "cpu" or dtype != torch.bfloat16 or torch.compiler.is_compiling():
        return None
    kernels = cpu_kernels.load()
    return kernels if isinstance(kernels, Kernels) else None


def check_ids(name: str, ids: Tensor, vocabulary: int) -> None:
    """Raise ValueError for what C would take for a place outside of the logits."""
    if ids.dtype != torch.int64 or not 0 <= ids.min() <= ids.max() < vocabulary:
        raise ValueError(f"loss: {name} ({ids.dtype}) must be int64 ids in 0 … {vocabulary - 1}")


class CrossEntropy:
    """weights * (nll + z_loss * logsumexp²); targets and weights (N,)."""

    def __init__(self, targets: Tensor, weights: Tensor, z_loss: float, fused: bool) -> None:
        self._targets, self._weights, self._z_loss, self._fused = targets, weights, z_loss, fused

    def value(self, logits: Tensor, part: slice) -> Tensor:
        wide = logits.float()
        total = wide.logsumexp(-1)
        chosen = wide.gather(-1, self._targets[part, None])[:, 0]
        return torch.dot(self._weights[part], total - chosen + self._z_loss * total.square())

    def gradient(self, logits: Tensor, part: slice) -> tuple[Tensor, Tensor]:
        targets, weights, z_loss = self._targets[part], self._weights[part], self._z_loss
        kernels = loss_kernels(logits.device, logits.dtype)
        if kernels is not None:
            check_ids("targets", targets, logits.shape[1])
            losses = weights.new_empty(len(logits))
            kernels(
                "cross_entropy",
                logits,
                targets.contiguous(),
                weights.contiguous(),
                z_loss,
                losses,
                *logits.shape,
            )
            return losses.sum(), logits
        if self._fused:
            return _fused_gradient()(logits, targets, weights, z_loss)
        wide = logits.float()
        total = wide.logsumexp(-1)
        index = targets[:, None]
        loss = torch.dot(weights, total - wide.gather(-1, index)[:, 0] + z_loss * total.square())
        gradient = wide.sub_(total[:, None]).exp_()  # the softmax
        gradient.mul_((weights * (1 + 2 * z_loss * total))[:, None])
        gradient.scatter_add_(-1, index, -weights[:, None])
        return loss, gradient.to(logits.dtype)


@functools.cache
def _fused_gradient() -> Callable[..., tuple[Tensor, Tensor]]:
    compiled: Any = torch.compile(_gradient_at_once, dynamic=False)
    return compiled  # type: ignore[no-any-return]


def _gradient_at_once(
    logits: Tensor, targets: Tensor, weights: Tensor, z_loss: float
) -> tuple[Tensor, Tensor]:
    """What `CrossEntropy.gradient` computes, with nothing in place: a compiler makes one kernel of it."""
    wide = logits.float()
    total = wide.logsumexp(-1)
    chosen = wide.gather(-1, targets[:, None])[:, 0]
    loss = torch.dot(weights, total - chosen + z_loss * total.square())
    here = torch.arange(logits.shape[1], device=logits.device) == targets[:, None]
    softmax = (wide - total[:, None]).exp()
    gradient = softmax * (weights * (1 + 2 * z_loss * total))[:, None] - torch.where(
        here, weights[:, None], 0.0
    )
    return loss, gradient.to(logits.dtype)
