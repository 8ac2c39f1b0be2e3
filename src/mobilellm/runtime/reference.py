"""The arithmetic of a .gguf model, in numpy: what every faster engine must give, within rounding.

    x = row of the embedding
    for every step of the schedule, with the weights of its block and the cache slot of the step:
        q, k, v = W norm(x);  q and k are rotated;  k and v join the slot, rounded as kv_cache.py says
        x = x + O attend(q, keys, values)
        x = x + D (silu(G norm(x)) * U norm(x))
    logits = H norm(x)

Numbers are float32 unless said. A product with a matrix in blocks (Q8_0, Q4_0) rounds its input to 8 bits
first: each run of 32 numbers of x becomes s * q with s = max|x| / 127 and q = x / s to the nearest whole
number, halves to even (0 where s <= 1e-30). So is q where keys and values are in 8 bits (q8_0). F32, F16 and
BF16 matrices take x as it is, keys in float16 q.

T new tokens, S tokens in the cache with them, H heads, K key/value heads, D head_dim, E hidden size.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from mobilellm import gguf_model
from mobilellm.config import ModelConfig
from mobilellm.gguf import GGUF, read_gguf
from mobilellm.runtime.kv_cache import (
    CacheState,
    Floats,
    KVCache,
    KVCacheType,
    check_cache_type,
    numbers_of,
    rounded,
)


class ReferenceModel:
    """One model. Sequences are told apart by their caches, so that many may be in flight."""

    def __init__(self, file: GGUF, kv_cache: KVCacheType = "f16") -> None:
        self.config = gguf_model.read_config(file)
        self.kv_cache = check_cache_type(kv_cache, self.config)
        self._embedding = _Matrix.of(file, "token_embd.weight")
        self._blocks = [_Block.of(file, index) for index in range(self.config.num_layers)]
        self._norm = file.array("output_norm.weight")
        tied = self.config.tie_word_embeddings
        self._head = self._embedding if tied else _Matrix.of(file, "output.weight")

    def new_cache(self, capacity: int | None = None) -> Cache:
        """An empty cache for `capacity` tokens, by default the model's context."""
        capacity = self.config.max_position_embeddings if capacity is None else capacity
        return Cache(self.config, capacity, self.kv_cache)

    def forward(self, tokens: NDArray[np.integer], cache: Cache) -> Floats:
        """Feed tokens (T,) and return their final normalised states (T, E); the cache grows by T."""
        config = self.config
        cache.reserve(tokens, config.vocab_size)
        T = len(tokens)
        cos, sin = _rotation(config, np.arange(cache.length, cache.length + T))
        x = self._embedding.values[tokens]
        for step, index in enumerate(config.schedule):
            block = self._blocks[index]
            y = _norm(x, block.attention_norm, config.rms_norm_eps)
            q = _rotate(block.q(y).reshape(T, -1, config.head_dim), cos, sin)
            k = _rotate(block.k(y).reshape(T, -1, config.head_dim), cos, sin)
            keys, values = cache.append(step, k, block.v(y).reshape(T, -1, config.head_dim))
            q = q if self.kv_cache == "f16" else round_to_8_bits(q)
            x = x + block.o(_attend(q, keys, values))
            y = _norm(x, block.ffn_norm, config.rms_norm_eps)
            x = x + block.down(_silu(block.gate(y)) * block.up(y))
        cache.length += T
        return _norm(x, self._norm, config.rms_norm_eps)

    def forward_batch(self, feeds: Sequence[tuple[NDArray[np.integer], Cache]]) -> Floats:
        """Feed tokens (T_i,) each to its own cache; states (sum of T_i, E)."""
        return np.concatenate([self.forward(tokens, cache) for tokens, cache in feeds])

    def logits(self, states: Floats) -> Floats:
        """Logits (T, V) of final states (T, E)."""
        return self._head(states)


class Cache(KVCache):
    """Keys and values of one sequence: a slot for every executed step."""

    def __init__(self, config: ModelConfig, capacity: int, kind: KVCacheType) -> None:
        super().__init__(config, capacity, kind)
        self._keys, self._values = self.empty_state(capacity)

    def state(self) -> CacheState:
        """A copy of what is in here, to be kept or to go on from in another cache."""
        return CacheState(self._keys[:, : self.length].copy(), self._values[:, : self.length].copy())

    def restore(self, state: CacheState) -> None:
        """Hold what `state` holds and nothing else. Raises ValueError for one that does not fit."""
        tokens = self.check_state(state)
        self._keys[:, :tokens], self._values[:, :tokens] = state
        self.length = tokens

    def append(self, step: int, keys: Floats, values: Floats) -> tuple[Floats, Floats]:
        """Store (T, K, D) of one executed step; return all so far, (S, K, D)."""
        start, end = self.length, self.length + len(keys)
        for kept, new in (self._keys, keys), (self._values, values):
            kept[step, start:end] = rounded(self.kind, new)
        return numbers_of(self.kind, self._keys[step, :end]), numbers_of(self.kind, self._values[step, :end])


def load(path: str | Path, kv_cache: KVCacheType = "f16") -> ReferenceModel:
    """Raises FileNotFoundError, or ValueError with one line naming file and fault."""
    return ReferenceModel(read_gguf(path), kv_cache)


class _Matrix(NamedTuple):
    values: Floats  # (rows, columns)
    in_blocks: bool

    @classmethod
    def of(cls, file: GGUF, name: str) -> _Matrix:
        return cls(file.array(name), file.tensors[name].type.block > 1)

    def __call__(self, x: Floats) -> Floats:
        product: Floats = (round_to_8_bits(x) if self.in_blocks else x) @ self.values.T
        return product


class _Block(NamedTuple):
    attention_norm: Floats
    q: _Matrix
    k: _Matrix
    v: _Matrix
    o: _Matrix
    ffn_norm: Floats
    gate: _Matrix
    up: _Matrix
    down: _Matrix

    @classmethod
    def of(cls, file: GGUF, index: int) -> _Block:
        matrices = {
            name: _Matrix.of(file, f"blk.{index}.{name}.weight")
            for name in ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")
        }
        q, k, v, o, gate, up, down = matrices.values()
        norms = [file.array(f"blk.{index}.{name}.weight") for name in ("attn_norm", "ffn_norm")]
        return cls(norms[0], q, k, v, o, norms[1], gate, up, down)


def round_to_8_bits(x: Floats) -> Floats:
    """x (T, E) as a product with a matrix in blocks sees it."""
    runs = x.reshape(len(x), -1, 32)
    scale = np.abs(runs).max(axis=2, keepdims=True) / np.float32(127)
    inverse = np.divide(1, scale, out=np.zeros_like(scale), where=scale > 1e-30)
    nearest: Floats = np.rint(runs * inverse) * scale
    return nearest.reshape(x.shape)


def _norm(x: Floats, weight: Floats, epsilon: float) -> Floats:
    mean = np.mean(x * x, axis=-1, keepdims=True)
    normed: Floats = x / np.sqrt(mean + np.float32(epsilon)) * weight
    return normed


def _rotation(config: ModelConfig, positions: NDArray[np.integer]) -> tuple[Floats, Floats]:
    """Cosine and sine (T, 1, D / 2) of each position's angles."""
    exponents = np.arange(0, config.head_dim, 2, dtype=np.float64) / config.head_dim
    angles = positions[:, None] / config.rope_theta**exponents
    return np.cos(angles)[:, None].astype(np.float32), np.sin(angles)[:, None].astype(np.float32)


def _rotate(x: Floats, cos: Floats, sin: Floats) -> Floats:
    """Turn the pairs (2i, 2i + 1) of every head of x (T, heads, D)."""
    even, odd = x[..., 0::2], x[..., 1::2]
    turned = np.empty_like(x)
    turned[..., 0::2], turned[..., 1::2] = even * cos - odd * sin, even * sin + odd * cos
    return turned


def _attend(q: Floats, keys: Floats, values: Floats) -> Floats:
    """Causal attention (T, H * D) of q (T, H, D), the last T of S tokens, over keys and values (S, K, D)."""
    T, H, D = q.shape
    S, K, _ = keys.shape
    grouped = q.reshape(T, K, H // K, D)  # H / K query heads share a key/value head
    scores = np.einsum("tkgd,skd->kgts", grouped, keys) / np.float32(np.sqrt(D))
    visible = np.arange(S) <= np.arange(S - T, S)[:, None]
    scores = np.where(visible, scores, -np.inf)
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    weights /= weights.sum(axis=-1, keepdims=True)
    out: Floats = np.einsum("kgts,skd->tkgd", weights, values).reshape(T, H * D)
    return out


def _silu(x: Floats) -> Floats:
    with np.errstate(over="ignore"):  # e^-x overflows where silu is 0
        out: Floats = x / (1 + np.exp(-x))
    return out
