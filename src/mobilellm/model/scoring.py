"""The forward pass to score with: states of some places, and what their logits say.

On a CPU all that lies between matrix products is done by cpu_*.c: attention without a tensor of scores, the
rest in one pass over memory each, in place where it can be. Weights in bfloat16 keep a residual stream in
float32. Elsewhere `MobileLLM.hidden` does it. The last block goes on from attention with those places alone
that are asked for.
N = B * T tokens, R places asked for; other letters as in transformer.py.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mobilellm.model import cpu_kernels
from mobilellm.model.cpu_kernels import Kernels
from mobilellm.model.fused import FusedWeights
from mobilellm.model.products import has_bfloat16
from mobilellm.model.rope import angles
from mobilellm.model.transformer import Block, MobileLLM

KERNEL_HEAD_DIM = 16
"""The kernels' heads are a multiple of so many numbers."""


class Summary(NamedTuple):
    """Of rows of logits (R, V)."""

    total: Tensor
    """(R,) The logarithm of the sum of exponentials: a logit less this is a log-likelihood."""
    highest: Tensor
    """(R,) The id of the highest logit, of equal ones the lowest id."""


@torch.inference_mode()
def states_at(
    model: MobileLLM,
    fused: FusedWeights,
    tokens: Tensor,
    positions: Tensor,
    ends: Tensor | None,
    places: Tensor,
) -> Tensor:
    """Final normalised states (R, E) of `places` (R,), counted through the rows of tokens (B, T).

    `positions` (B, T) as in `MobileLLM.hidden`. Place t of a row sees those c <= t that end after it, where
    t < ends[row, c] (B, T, int32), or without `ends` all c <= t.
    """
    kernels = _kernels(model.head_weight)
    config = model.config
    blocks = [_block(model, index) for index in config.schedule]
    rounds = any(block.self_attn.kv_rounding is not None for block in blocks)
    if kernels is None or config.head_dim % KERNEL_HEAD_DIM or rounds:
        mask = None if ends is None else _mask(ends)
        return model.hidden(tokens, positions=positions, mask=mask, fused=fused).flatten(0, 1)[places]
    (B, T), H, K, D = tokens.shape, config.num_heads, config.num_kv_heads, config.head_dim
    dtype = model.head_weight.dtype
    narrowed = int(dtype == torch.bfloat16)
    angle = angles(positions.flatten(), D, config.rope_theta)
    cos, sin = angle.cos(), angle.sin()  # (N, D / 2)
    norms = [block.input_layernorm.weight for block in blocks] + [model.model.norm.weight]
    x = F.embedding(tokens.flatten(), model.model.embed_tokens.weight).float()

    def norm(x: Tensor, residual: Tensor | None, weight: Tensor) -> Tensor:
        """The norm of x (N, E) after the residual is added to x in place."""
        y = torch.empty_like(x, dtype=dtype)
        kernels("scoring_norm", x, residual, weight.float(), y, narrowed, *x.shape, config.rms_norm_eps)
        return y

    y = norm(x, None, norms[0])
    for step, index in enumerate(config.schedule):
        products = fused.blocks[index]
        out = x.new_empty(B * T, H * D, dtype=dtype)
        kernels("attention", products.qkv(y), cos, sin, ends, out, narrowed, B, T, K, H // K, D)
        if step == config.num_steps - 1:
            out, x = out[places], x[places]
        y = norm(x, products.o(out), blocks[step].post_attention_layernorm.weight)
        inner = y.new_empty(len(y), config.intermediate_size)
        kernels("swiglu" if narrowed else "float_swiglu", products.gate_up(y), inner, *inner.shape)
        y = norm(x, products.down(inner), norms[step + 1])
    return y


@torch.inference_mode()
def summary(logits: Tensor) -> Summary:
    """What logits (R, V) say, without a second tensor of their size where the kernels are there."""
    kernels = _kernels(logits)
    if kernels is None:
        return Summary(logits.float().logsumexp(-1), logits.argmax(-1))
    total = logits.new_empty(len(logits), dtype=torch.float32)
    highest = logits.new_empty(len(logits), dtype=torch.int64)
    kernels("highest", logits, total, highest, int(logits.dtype == torch.bfloat16), *logits.shape)
    return Summary(total, highest)


def _mask(ends: Tensor) -> Tensor:
    """(B, 1, T, T), True where a query may look."""
    nodes = torch.arange(ends.shape[1], device=ends.device)
    return ((nodes <= nodes[:, None]) & (nodes[:, None] < ends[:, None]))[:, None]


def _block(model: MobileLLM, index: int) -> Block:
    block = model.model.layers[index]
    assert isinstance(block, Block)
    return block


def _kernels(weight: Tensor) -> Kernels | None:
    if weight.device.type != "cpu" or weight.dtype not in (torch.float32, torch.bfloat16):
        return None
    if weight.dtype == torch.bfloat16 and not has_bfloat16():
        return None
    kernels = cpu_kernels.load()
    return kernels if isinstance(kernels, Kernels) else None
