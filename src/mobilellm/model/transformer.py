"""MobileLLM, whole: embedding, a schedule of pre-norm blocks, final norm, (tied) head.

Module and parameter names are those of Llama checkpoints. Shapes in comments:
B batch, T new tokens, S cached and new tokens, E hidden_size, H heads, K key/value heads, D head_dim,
F intermediate_size, V vocab_size.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mobilellm.config import ModelConfig
from mobilellm.model.cache import KVCache
from mobilellm.model.document_mask import Documents, attend_apart, segmented_view
from mobilellm.model.rope import Rotation, rotate, rotation

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

    from mobilellm.model.fused import FusedBlock, FusedWeights
    from mobilellm.model.quantized import Quantization
    from mobilellm.model.rounding import Rounding
    from mobilellm.model.training import Runner


class MobileLLM(nn.Module):
    """Decoder-only language model (Liu et al. 2024, arXiv 2402.14905).

    A fresh model is initialised from N(0, config.initializer_range), norms at one. Under
    `with torch.device("meta")` it holds shapes only.

    >>> from mobilellm.presets import preset
    >>> model = MobileLLM(preset("test"))
    >>> model(torch.tensor([[1, 7, 9], [1, 4, 4]])).shape  # ids (B, T) to logits (B, T, V)
    torch.Size([2, 3, 384])
    """

    def __init__(self, config: ModelConfig, generator: torch.Generator | None = None) -> None:
        super().__init__()
        self.config = config
        self.model = Decoder(config)
        self.lm_head = None if config.tie_word_embeddings else Linear(config.hidden_size, config.vocab_size)
        self.head_rounding: Rounding | None = None
        self.quantization: Quantization | None = None  # what it was read from; the roundings follow from it
        self.base_fingerprint: str | None = None  # of the weights that adapters were put on
        self.inference_layout: FusedWeights | None = None  # kept by model/generate.py; never saved
        if not self.head_weight.is_meta:
            self.initialize(generator)

    def forward(
        self,
        tokens: Tensor,
        cache: KVCache | None = None,
        positions: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        """Logits (B, T, V) of token ids (B, T); arguments as in `hidden`."""
        return self.logits(self.hidden(tokens, cache, positions, mask))

    def hidden(
        self,
        tokens: Tensor,
        cache: KVCache | None = None,
        positions: Tensor | None = None,
        mask: Tensor | BlockMask | Documents | None = None,
        fused: FusedWeights | None = None,
        *,
        segments: Tensor | None = None,
        activation_checkpointing: bool = False,
        runner: Runner | None = None,
    ) -> Tensor:
        """Final normalised hidden states (B, T, E).

        Without a mask attention is causal. `positions` (T,) or (B, T) and the boolean `mask`, broadcastable
        to (B, 1, T, S) with True where a query may look, serve left padding and the like; `segments` (B, T)
        numbers the documents of packed rows, each of which then stands alone and begins at position 0
        (`document_mask.segmented_view` makes positions and mask of them). With a cache all of these follow
        from it, and must be left out. `fused` holds the same weights in the layout of `model/fused.py`, for
        inference. For training, `activation_checkpointing` runs blocks again in backward instead of keeping
        what they made, and `runner` is a faster way through them (`model/training.py`).

        Raises ValueError for what contradicts itself, and for a batch or length that the cache was not made
        for, before anything is written to it.
        """
        if tokens.ndim != 2 or tokens.numel() == 0:
            raise ValueError(f"tokens have shape {tuple(tokens.shape)}; expected (batch, length), not empty")
        T = tokens.shape[1]
        view = mask
        if cache is not None:
            if positions is not None or mask is not None or segments is not None:
                raise ValueError("positions and mask follow from the cache; leave them and segments out")
            cache.reserve(*tokens.shape)
            positions, view = cache.view(T)
        elif segments is not None:
            if positions is not None or mask is not None:
                raise ValueError("positions and mask follow from segments; leave them out")
            positions, view = segmented_view(segments, tokens.device, products_dtype(self.head_weight))
        elif positions is None:
            positions = torch.arange(T, device=tokens.device)
        weight = self.model.embed_tokens.weight
        x = F.embedding(tokens, weight) if runner is None else runner.embed(weight, tokens)
        rope = rotation(positions, self.config.head_dim, self.config.rope_theta, x.dtype)
        for step, index in enumerate(self.config.schedule):
            block, block_fused = self.model.layers[index], fused.blocks[index] if fused is not None else None
            arguments = (x, rope, view, cache, step, block_fused, runner)
            x = (
                checkpoint(block, *arguments, use_reentrant=False)
                if activation_checkpointing
                else block(*arguments)
            )
        if cache is not None:
            cache.advance(T)
        out: Tensor = self.model.norm(x) if runner is None else runner.norm(self.model.norm, x)
        return out

    def logits(self, hidden: Tensor, fused: FusedWeights | None = None) -> Tensor:
        """Logits (..., V) of hidden states (..., E); compute only the rows you need."""
        if fused is not None:
            return fused.head(hidden)
        return F.linear(_rounded(hidden, self.head_rounding), self.head_weight)

    @property
    def head_weight(self) -> Tensor:
        """The output projection (V, E): the embedding itself when tied."""
        return self.model.embed_tokens.weight if self.lm_head is None else self.lm_head.weight

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "inference_layout": None}  # it holds kernels, which cannot be pickled

    def new_cache(self, batch: int, capacity: int, padding: Tensor | None = None) -> KVCache:
        """An empty cache for `capacity` tokens (padding included) in the weights' dtype and device."""
        weight = self.model.embed_tokens.weight
        return KVCache(self.config, batch, capacity, weight.dtype, weight.device, padding)

    @torch.no_grad()
    def initialize(self, generator: torch.Generator | None = None) -> None:
        """Draw fresh weights, without depth scaling (as the reference code); norms at one."""
        for parameter in self.parameters():
            if parameter.ndim == 1:
                parameter.fill_(1.0)
            else:
                parameter.normal_(0.0, self.config.initializer_range, generator=generator)


class Decoder(nn.Module):
    """Holds the stored blocks; MobileLLM runs them. Exists so that names read `model.layers.N…`."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)). It does not know where in the schedule it stands."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.input_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.mlp = SwiGLU(config)

    def forward(
        self,
        x: Tensor,  # (B, T, E)
        rope: Rotation,
        mask: Tensor | BlockMask | Documents | None,
        cache: KVCache | None = None,
        step: int = 0,
        fused: FusedBlock | None = None,
        runner: Runner | None = None,
    ) -> Tensor:
        if runner is not None and (done := runner.block(self, x)) is not None:
            return done
        x = x + self.self_attn(self.input_layernorm(x), rope, mask, cache, step, fused)
        out: Tensor = x + self.mlp(self.post_attention_layernorm(x), fused)
        return out


class Attention(nn.Module):
    """Grouped-query attention (Ainslie et al. 2023): H query heads share K key/value heads."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.num_heads, self.num_kv_heads = config.num_heads, config.num_kv_heads
        self.head_dim = config.head_dim
        width, kv_width = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        self.q_proj = Linear(config.hidden_size, width)
        self.k_proj = Linear(config.hidden_size, kv_width)
        self.v_proj = Linear(config.hidden_size, kv_width)
        self.o_proj = Linear(width, config.hidden_size)
        self.kv_rounding: Rounding | None = None

    def forward(
        self,
        x: Tensor,
        rope: Rotation,
        mask: Tensor | BlockMask | Documents | None,
        cache: KVCache | None,
        step: int,
        fused: FusedBlock | None,
    ) -> Tensor:
        B, T, _ = x.shape
        H, K, D = self.num_heads, self.num_kv_heads, self.head_dim
        if fused is None:
            q = rotate(self.q_proj(x).view(B, T, H, D), rope)
            k = rotate(self.k_proj(x).view(B, T, K, D), rope)
            v = self.v_proj(x).view(B, T, K, D)
        else:
            qkv = fused.qkv(x).view(B, T, H + 2 * K, D)
            rotated, v = rotate(qkv[:, :, : H + K], rope), qkv[:, :, H + K :]
            q, k = rotated[:, :, :H], rotated[:, :, H:]
        k, v = _rounded(k, self.kv_rounding), _rounded(v, self.kv_rounding)
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)  # (B, heads, T, D)
        if cache is not None:
            k, v = cache.append(step, k, v)
        out = _attend(q, k, v, mask).transpose(1, 2).reshape(B, T, H * D)
        projected: Tensor = self.o_proj(out) if fused is None else fused.o(out)
        return projected


class SwiGLU(nn.Module):
    """down(silu(gate(x)) * up(x)) (Shazeer 2020)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gate_proj = Linear(config.hidden_size, config.intermediate_size)
        self.up_proj = Linear(config.hidden_size, config.intermediate_size)
        self.down_proj = Linear(config.intermediate_size, config.hidden_size)

    def forward(self, x: Tensor, fused: FusedBlock | None = None) -> Tensor:
        if fused is None:
            out: Tensor = self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
            return out
        gate, up = fused.gate_up(x).chunk(2, dim=-1)
        return fused.down(F.silu(gate) * up)


class Linear(nn.Linear):
    """nn.Linear without bias, its weight left to `MobileLLM.initialize`; it rounds its input if told to."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(in_features, out_features, bias=False)
        self.rounding: Rounding | None = None

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(_rounded(x, self.rounding), self.weight)

    def reset_parameters(self) -> None:
        """Draw nothing: on the meta device drawing makes torch import its compiler, which takes 1.7 s."""


class Embedding(nn.Embedding):
    """nn.Embedding, its weight left to `MobileLLM.initialize`."""

    def reset_parameters(self) -> None:
        """Draw nothing, as in Linear."""


def products_dtype(x: Tensor) -> torch.dtype:
    """In which matrix products with x run: autocast's dtype where that is on."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


def _rounded(x: Tensor, rounding: Rounding | None) -> Tensor:
    return x if rounding is None else rounding(x)


def _attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | BlockMask | Documents | None) -> Tensor:
    """Scaled dot-product attention of q (B, H, T, D) over k, v (B, K, S, D)."""
    if mask is not None and not isinstance(mask, Tensor):
        return attend_apart(q, k, v, mask)
    B, H, T, D = q.shape
    K = k.shape[1]
    if T == 1:
        # One new token sees every key, so the H/K queries that share a key/value head can stand as rows of
        # one small matrix: on a CPU in bfloat16 5 times faster than the grouped kernel (docs/log.md).
        rows = q.reshape(B, K, H // K, D)
        return F.scaled_dot_product_attention(rows, k, v, attn_mask=mask).view(B, H, 1, D)
    # Without a mask, T == S and attention is causal.
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=H != K)
