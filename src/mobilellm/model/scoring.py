"""The forward pass to score with: states of some places, and what their logits say.

On a CPU in float32 all that lies between matrix products and attention is done by cpu_kernels.c in one pass
over memory each, in place where it can be; elsewhere `MobileLLM.hidden` does it. The last block goes on from
attention with those places alone that are asked for.
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
from mobilellm.model.rope import angles
from mobilellm.model.transformer import Block, MobileLLM


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
    mask: Tensor | None,
    places: Tensor,
) -> Tensor:
    """Final normalised states (R, E) of `places` (R,), counted through the rows of tokens (B, T).

    `positions` (B, T) and `mask` as in `MobileLLM.hidden`, which computes the same.
    """
    kernels = _kernels(model.head_weight)
    if kernels is None:
        return model.hidden(tokens, positions=positions, mask=mask, fused=fused).flatten(0, 1)[places]
    config, blocks = model.config, [_block(model, index) for index in model.config.schedule]
    (B, T), H, K, D = tokens.shape, config.num_heads, config.num_kv_heads, config.head_dim
    angle = angles(positions.flatten(), D, config.rope_theta)
    cos, sin = angle.cos(), angle.sin()  # (N, D / 2)
    norms = [block.input_layernorm.weight for block in blocks] + [model.model.norm.weight]
    x = F.embedding(tokens.flatten(), model.model.embed_tokens.weight)
    y = _norm(kernels, x, None, norms[0], config.rms_norm_eps)
    for step, index in enumerate(config.schedule):
        products = fused.blocks[index]
        qkv = products.qkv(y)
        kernels("float_rotary", qkv, cos, sin, B * T, H + K, H + 2 * K, D)
        q, k, v = torch.split(qkv.view(B, T, H + 2 * K, D).transpose(1, 2), [H, K, K], dim=1)
        if (rounding := blocks[step].self_attn.kv_rounding) is not None:
            k, v = rounding(k), rounding(v)
        out = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=H != K
        )
        out = out.transpose(1, 2).reshape(B * T, H * D)
        if step == config.num_steps - 1:
            out, x = out[places], x[places]
        weight = blocks[step].post_attention_layernorm.weight
        y = _norm(kernels, x, products.o(out), weight, config.rms_norm_eps)
        inner = y.new_empty(len(y), config.intermediate_size)
        kernels("float_swiglu", products.gate_up(y), inner, *inner.shape)
        y = _norm(kernels, x, products.down(inner), norms[step + 1], config.rms_norm_eps)
    return y


@torch.inference_mode()
def summary(logits: Tensor) -> Summary:
    """What float32 logits (R, V) say, without a second tensor of their size where the kernels are there."""
    kernels = _kernels(logits)
    if kernels is None:
        return Summary(logits.logsumexp(-1), logits.argmax(-1))
    total, highest = logits.new_empty(len(logits)), logits.new_empty(len(logits), dtype=torch.int64)
    kernels("float_highest", logits, total, highest, *logits.shape)
    return Summary(total, highest)


def _norm(kernels: Kernels, x: Tensor, residual: Tensor | None, weight: Tensor, epsilon: float) -> Tensor:
    """The norm of x (N, E) after the residual is added to x in place."""
    y = torch.empty_like(x)
    kernels("float_norm", x, residual, weight, y, *x.shape, epsilon)
    return y


def _block(model: MobileLLM, index: int) -> Block:
    block = model.model.layers[index]
    assert isinstance(block, Block)
    return block


def _kernels(weight: Tensor) -> Kernels | None:
    if weight.device.type != "cpu" or weight.dtype != torch.float32:
        return None
    kernels = cpu_kernels.load()
    return kernels if isinstance(kernels, Kernels) else None
