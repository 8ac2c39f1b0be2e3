"""The model as ExecuTorch is given it: a fixed cache, new tokens at a place, and matrices as they are stored.

It computes what `model/transformer.py` does, written so that everything but attention goes to XNNPACK as few
large pieces: two of ExecuTorch's own operators (`llama::update_cache`, `llama::custom_sdpa`) keep keys and
values and attend, and stand between the pieces. Its runners (TextLLMRunner, on Android, on iOS) bring both.

    forward(tokens (1, T), input_pos (1,)) -> logits (1, T, V)

T is 1 … `chunk`; the cache holds `context` tokens for every executed step.
E hidden size, H heads, K key/value heads, D head_dim, S context, V vocabulary, G columns that share a scale.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mobilellm.config import ModelConfig
from mobilellm.model.quantized import Matrix, packed

StoredMatrix = Matrix | Tensor
"""A matrix (R, C) as a device holds it: codes and scales, or float32."""
Matrices = Callable[[str], StoredMatrix]
"""A matrix by its checkpoint name."""


class StaticModel(nn.Module):
    """One sequence. `input_pos` says where its new tokens stand: it can be gone on from any earlier place."""

    cos: Tensor
    sin: Tensor

    def __init__(
        self,
        config: ModelConfig,
        norms: Callable[[str], Tensor],
        matrices: Matrices,
        context: int,
        chunk: int,
    ) -> None:
        super().__init__()
        self.config, self.context, self.chunk = config, context, chunk
        self.embedding = Embedding(matrices("model.embed_tokens.weight"))
        self.blocks = nn.ModuleList(
            Block(config, f"model.layers.{index}", norms, matrices) for index in range(config.num_layers)
        )
        self.norm = Norm(norms("model.norm.weight"), config.rms_norm_eps)
        head = "model.embed_tokens.weight" if config.tie_word_embeddings else "lm_head.weight"
        self.head = Linear(matrices(head))
        cos, sin = _rotary_tables(config, context)
        self.register_buffer("cos", cos)
        self.register_buffer("sin", sin)
        shape = (1, context, config.num_kv_heads, config.head_dim)
        for step in range(config.num_steps):
            self.register_buffer(f"keys_{step}", torch.zeros(shape))
            self.register_buffer(f"values_{step}", torch.zeros(shape))

    def forward(self, tokens: Tensor, input_pos: Tensor) -> Tensor:
        T = tokens.shape[1]
        start = cast(int, input_pos[0].item())  # a symbol, while torch.export looks on
        for known in (start >= 0, start + T <= self.context):
            torch._check(known)  # type: ignore[no-untyped-call]
        cos, sin = self.cos.narrow(0, start, T), self.sin.narrow(0, start, T)  # (T, 1, D)
        x = self.embedding(tokens)
        for step, index in enumerate(self.config.schedule):
            x = self.blocks[index](
                x, cos, sin, getattr(self, f"keys_{step}"), getattr(self, f"values_{step}"), start
            )
        logits: Tensor = self.head(self.norm(x))
        return logits


class Block(nn.Module):
    swap: Tensor

    def __init__(
        self, config: ModelConfig, name: str, norms: Callable[[str], Tensor], matrices: Matrices
    ) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = config.num_heads, config.num_kv_heads, config.head_dim
        self.register_buffer("swap", _swap(config.head_dim))
        self.input_norm = Norm(norms(f"{name}.input_layernorm.weight"), config.rms_norm_eps)
        self.post_norm = Norm(norms(f"{name}.post_attention_layernorm.weight"), config.rms_norm_eps)

        def linear(part: str) -> Linear:
            return Linear(matrices(f"{name}.{part}_proj.weight"))

        self.q, self.k, self.v = linear("self_attn.q"), linear("self_attn.k"), linear("self_attn.v")
        self.o = linear("self_attn.o")
        self.gate, self.up, self.down = linear("mlp.gate"), linear("mlp.up"), linear("mlp.down")

    def forward(
        self, x: Tensor, cos: Tensor, sin: Tensor, keys: Tensor, values: Tensor, start: int
    ) -> Tensor:
        D = self.head_dim
        y = self.input_norm(x)
        q = self._rotated(self.q(y).view(1, -1, self.heads, D), cos, sin)
        k = self._rotated(self.k(y).view(1, -1, self.kv_heads, D), cos, sin)
        v = self.v(y).view(1, -1, self.kv_heads, D)
        torch.ops.llama.update_cache(k, keys, start)
        torch.ops.llama.update_cache(v, values, start)
        seen = torch.ops.llama.custom_sdpa(q, keys, values, start, None, 0.0, True)
        x = x + self.o(seen.view(1, -1, self.heads * D))
        y = self.post_norm(x)
        out: Tensor = x + self.down(F.silu(self.gate(y)) * self.up(y))
        return out

    def _rotated(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """x (1, T, heads, D) turned by angles (T, 1, D), pairs half a head apart: x cos + (-x2, x1) sin.

        The halves change places by a product with a matrix, since XNNPACK cannot cut a tensor of T rows.
        """
        return x * cos + F.linear(x, self.swap) * sin


class Norm(nn.Module):
    """RMSNorm whose mean is a product with a column of 1 / E: XNNPACK has no mean over the last dimension."""

    weight: Tensor
    share: Tensor

    def __init__(self, weight: Tensor, epsilon: float) -> None:
        super().__init__()
        self.register_buffer("weight", weight)
        self.register_buffer("share", torch.full((1, len(weight)), 1 / len(weight)))
        self.epsilon = epsilon

    def forward(self, x: Tensor) -> Tensor:
        mean_square = F.linear(x * x, self.share)
        return x * torch.rsqrt(mean_square + self.epsilon) * self.weight


class Linear(nn.Module):
    """x W^T. A quantised W has x rounded to 8 bits a token first, as XNNPACK does it: from min to max."""

    codes: Tensor
    scales: Tensor
    zeros: Tensor

    def __init__(self, matrix: StoredMatrix) -> None:
        super().__init__()
        self.quantised = isinstance(matrix, Matrix)
        self.register_buffer("codes", matrix.codes if isinstance(matrix, Matrix) else matrix)
        if isinstance(matrix, Matrix):
            scales = matrix.scales.float()
            scales = scales[:, 0] if scales.shape[1] == 1 else scales
            self.register_buffer("scales", scales)
            self.register_buffer("zeros", torch.zeros(scales.shape, dtype=torch.int8))

    def forward(self, x: Tensor) -> Tensor:
        if not self.quantised:
            return F.linear(x, self.codes)
        quantised = torch.ops.quantized_decomposed
        scale, zero = quantised.choose_qparams_per_token_asymmetric(x, torch.int8)
        x = quantised.quantize_per_token(x, scale, zero, -128, 127, torch.int8)
        x = quantised.dequantize_per_token(x, scale, zero, -128, 127, torch.int8, torch.float32)
        if self.scales.ndim == 1:
            weight = quantised.dequantize_per_channel(
                self.codes, self.scales, self.zeros, 0, -127, 127, torch.int8
            )
        else:
            group = self.codes.shape[1] // self.scales.shape[1]
            weight = quantised.dequantize_per_channel_group(
                self.codes, self.scales, self.zeros, -8, 7, torch.int8, group, torch.float32
            )
        return F.linear(x, weight)


class Embedding(nn.Module):
    """Rows of a table, made float32 after they are taken out of it, by operators that every runtime has."""

    codes: Tensor
    scales: Tensor

    def __init__(self, matrix: StoredMatrix) -> None:
        super().__init__()
        self.bits = matrix.bits if isinstance(matrix, Matrix) else 32
        codes = matrix.codes if isinstance(matrix, Matrix) else matrix
        self.register_buffer("codes", packed(codes) if self.bits == 4 else codes)
        if isinstance(matrix, Matrix):
            self.register_buffer("scales", matrix.scales.float())

    def forward(self, tokens: Tensor) -> Tensor:
        rows = F.embedding(tokens, self.codes)
        if self.bits == 32:
            return rows
        rows = rows.float()
        if self.bits == 4:
            high = torch.floor(rows / 16)
            rows = torch.stack((rows - 16 * high, high), dim=-1).flatten(-2) - 8
        scales = F.embedding(tokens, self.scales)
        groups = rows.view(*tokens.shape, scales.shape[-1], -1)
        return (groups * scales[..., None]).flatten(-2)


def _rotary_tables(config: ModelConfig, context: int) -> tuple[Tensor, Tensor]:
    """Cosines and sines (S, 1, D) of position * theta^(-2i / D), made in float64, once for each half."""
    exponents = torch.arange(0, config.head_dim, 2, dtype=torch.float64) / config.head_dim
    angles = torch.arange(context, dtype=torch.float64)[:, None] / config.rope_theta**exponents
    both = torch.cat((angles, angles), dim=-1)[:, None]
    return both.cos().float(), both.sin().float()


def _swap(head_dim: int) -> Tensor:
    """(D, D): x W^T is (-x2, x1) for the halves x1, x2 of x."""
    half, swap = head_dim // 2, torch.zeros(head_dim, head_dim)
    swap[:half, half:], swap[half:, :half] = -torch.eye(half), torch.eye(half)
    return swap
