"""What a sequence keeps of its tokens: keys and values, in one of two types, and how much room there is.

    f16     every number in float16
    q8_0    every run of 32 numbers as a block of Q8_0: scale * q, with scale = max|x| / 127 in float16 and
            q = x / scale to the nearest whole number, halves to even (0 where scale <= 1e-30);
            a run with a number that is infinite or none, or too large for that scale, has an infinite scale
            and q = 0: what reads it is no number, as what reads such numbers in float16 is none

A key or value is rounded by itself, when it is stored: how a prompt is cut changes nothing.
"""

from __future__ import annotations

from typing import Literal, NamedTuple, get_args

import numpy as np
from numpy.typing import DTypeLike, NDArray

from mobilellm.accounting import kv_cache_bytes_per_token
from mobilellm.config import ModelConfig
from mobilellm.gguf_blocks import BLOCK, TYPES, join_q8_0

Floats = NDArray[np.float32]
KVCacheType = Literal["f16", "q8_0"]
KV_CACHE_TYPES: tuple[KVCacheType, ...] = get_args(KVCacheType)
_INFINITE = np.array([np.inf], "<f2").view(np.uint8)


class CacheState(NamedTuple):
    """Keys and values of a sequence's first tokens, of any engine's cache: float16 (steps, tokens, K, D), or
    uint8 (steps, tokens, K, bytes of D numbers in Q8_0)."""

    keys: NDArray[np.generic]
    values: NDArray[np.generic]


def check_cache_type(kind: str, config: ModelConfig) -> KVCacheType:
    """Raises ValueError for a type that is not known, or that this model's heads do not fit."""
    if kind not in KV_CACHE_TYPES:
        raise ValueError(f"kv_cache = {kind!r} is not known; choose {' or '.join(KV_CACHE_TYPES)}")
    if kind == "q8_0" and config.head_dim % BLOCK:
        raise ValueError(
            f"kv_cache = 'q8_0' keeps runs of {BLOCK} numbers, which do not divide this model's heads of "
            f"{config.head_dim}; choose f16"
        )
    return kind


def number_type(kind: KVCacheType) -> DTypeLike:
    """Of what a CacheState's arrays are made."""
    return np.float16 if kind == "f16" else np.uint8


def bytes_per_token(kind: KVCacheType, config: ModelConfig) -> int:
    """What a token in a cache takes."""
    return kv_cache_bytes_per_token(config, TYPES[kind.upper()].bits)


def rounded(kind: KVCacheType, numbers: Floats) -> NDArray[np.generic]:
    """Keys or values (…, D) as they are kept."""
    with np.errstate(over="ignore"):
        if kind == "f16":
            return numbers.astype(np.float16)
        runs = numbers.reshape(-1, BLOCK)
        scale = np.abs(runs).max(axis=1) / np.float32(127)
        known = np.isfinite(scale.astype(np.float16))
    inverse = np.divide(1, scale, out=np.zeros_like(scale), where=known & (scale > 1e-30))
    codes = np.rint(np.where(known[:, None], runs, 0) * inverse[:, None]).astype(np.int8)
    blocks = join_q8_0(np.where(known, scale, 0), codes)
    blocks[~known, :2] = _INFINITE
    return blocks.reshape(*numbers.shape[:-1], -1)


def numbers_of(kind: KVCacheType, kept: NDArray[np.generic]) -> Floats:
    """The numbers (…, D) of what `rounded` gave."""
    if kind == "f16":
        return kept.astype(np.float32)
    numbers = kept.shape[-1] // TYPES["Q8_0"].block_bytes * BLOCK
    with np.errstate(invalid="ignore"):  # an infinite scale times 0
        return TYPES["Q8_0"].decode(np.ascontiguousarray(kept, np.uint8), (*kept.shape[:-1], numbers))


class Room:
    """What a sequence may still be fed: `length` tokens of `capacity` are there."""

    def __init__(self, config: ModelConfig, capacity: int) -> None:
        if not 1 <= capacity <= config.max_position_embeddings:
            raise ValueError(
                f"a cache of {capacity} tokens must lie in 1 … {config.max_position_embeddings}, the context"
            )
        self.capacity, self.length = capacity, 0

    def reserve(self, tokens: NDArray[np.integer], vocab_size: int) -> None:
        """Refuse what is no token and what does not fit, before anything is written. Raises ValueError."""
        if tokens.ndim != 1 or len(tokens) == 0:
            raise ValueError(f"tokens have shape {tokens.shape}; expected a sequence that is not empty")
        if not 0 <= tokens.min() <= tokens.max() < vocab_size:
            raise ValueError(
                f"token ids {tokens.min()} … {tokens.max()} are not in the vocabulary of {vocab_size}"
            )
        if self.length + len(tokens) > self.capacity:
            raise ValueError(
                f"the cache holds {self.length} of {self.capacity} tokens and cannot take {len(tokens)} more"
            )

    def truncate(self, length: int) -> None:
        """Forget everything after `length` tokens."""
        if not 0 <= length <= self.length:
            raise ValueError(f"cannot truncate a cache of {self.length} tokens to {length}")
        self.length = length


class KVCache(Room):
    """One whose keys and values can be kept and go on in another."""

    def __init__(self, config: ModelConfig, capacity: int, kind: KVCacheType) -> None:
        super().__init__(config, capacity)
        self.kind, self._config = kind, config

    def empty_state(self, tokens: int) -> CacheState:
        """Room for a state of `tokens` tokens."""
        head_dim, dtype = self._config.head_dim, number_type(self.kind)
        numbers = TYPES[self.kind.upper()].nbytes((head_dim,)) // np.dtype(dtype).itemsize
        shape = (self._config.num_steps, tokens, self._config.num_kv_heads, numbers)
        return CacheState(np.empty(shape, dtype), np.empty(shape, dtype))

    def check_state(self, state: CacheState) -> int:
        """The tokens of a state that fits in here. Raises ValueError for one that does not."""
        tokens = state.keys.shape[1] if state.keys.ndim == 4 else 0
        right = self.empty_state(tokens)
        if not state.keys.dtype == state.values.dtype == right.keys.dtype:
            other = next(
                (kind for kind in KV_CACHE_TYPES if state.keys.dtype == number_type(kind)), self.kind
            )
            if other == self.kind:
                raise ValueError(
                    f"a cache's state of {state.keys.dtype} and {state.values.dtype} is none of a cache in "
                    f"{self.kind}; expected {right.keys.dtype}"
                )
            raise ValueError(
                f"a state in {state.keys.dtype} is of a cache in {other}, and this one is in {self.kind}; "
                f"load the model with kv_cache = {other!r}"
            )
        if not state.keys.shape == state.values.shape == right.keys.shape:
            raise ValueError(
                f"a cache's state of shapes {state.keys.shape} and {state.values.shape} is not this model's; "
                f"expected (steps, tokens, heads, numbers) = {right.keys.shape}"
            )
        if tokens > self.capacity:
            raise ValueError(f"a state of {tokens} tokens does not fit a cache of {self.capacity}")
        return tokens
