"""How numbers lie in a GGUF file: one table of types, each to bytes and back, in numpy.

    F32, F16, BF16   a number by itself
    Q8_0             32 numbers: scale f16, 32 signed bytes                               8.5 bits a number
    Q4_0             32 numbers: scale f16, 16 bytes of two nibbles: i low, i + 16 high   4.5 bits a number

x = scale * q in Q8_0 and scale * (q - 8) in Q4_0. Rounding is ggml's, so that our files equal those that
llama.cpp's quantiser writes: Q8_0 to the nearest, halves away from zero, scale max|x| / 127; Q4_0 with the
number of largest magnitude at -8, so scale = that number / -8, and truncation of x / scale + 8.5.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

BLOCK = 32
_NUMBERS_AT_ONCE = 2**17
Floats = NDArray[np.float32]
Bytes = NDArray[np.uint8]


@dataclass(frozen=True)
class BlockType:
    """One way to store numbers; rows hold whole blocks."""

    name: str
    number: int
    """In the file: ggml's."""
    block: int
    """Numbers in a block."""
    block_bytes: int
    _encode: Callable[[Floats], Bytes]
    _decode: Callable[[Bytes], Floats]

    @property
    def bits(self) -> float:
        """A number takes, scales included."""
        return 8 * self.block_bytes / self.block

    def nbytes(self, shape: Sequence[int]) -> int:
        return prod(shape) // self.block * self.block_bytes

    def encode(self, values: NDArray[Any]) -> Bytes:
        """Bytes of an array whose last dimension is a multiple of the block. Raises ValueError otherwise."""
        if values.shape[-1] % self.block:
            raise ValueError(
                f"{self.name}: rows of {values.shape[-1]} numbers are no multiple of {self.block}, its block"
            )
        flat, rows = values.reshape(-1, self.block), _NUMBERS_AT_ONCE // self.block
        encoded = np.empty((len(flat), self.block_bytes), np.uint8)
        for start in range(0, len(flat), rows):  # what lies between stays in the processor's cache
            some = np.ascontiguousarray(flat[start : start + rows], dtype=np.float32)
            if not np.isfinite(some).all():
                raise ValueError(f"{self.name}: there are numbers that are not finite")
            encoded[start : start + rows] = self._encode(some).reshape(-1, self.block_bytes)
        return encoded.reshape(-1)

    def decode(self, raw: Bytes, shape: Sequence[int]) -> Floats:
        return self._decode(raw.reshape(-1, self.block_bytes)).reshape(tuple(shape))


def split_q8_0(raw: Bytes) -> tuple[Floats, NDArray[np.int8]]:
    """Scales (N,) and whole numbers (N, 32) of N blocks (N, 34)."""
    return _scales(raw), raw[:, 2:].view(np.int8)


def split_q4_0(raw: Bytes) -> tuple[Floats, NDArray[np.int8]]:
    """Scales (N,) and whole numbers -8 … 7 (N, 32) of N blocks (N, 18)."""
    nibbles = np.concatenate([raw[:, 2:] & 15, raw[:, 2:] >> 4], axis=1)
    return _scales(raw), nibbles.astype(np.int8) - np.int8(8)


def join_q8_0(scales: Floats, codes: NDArray[np.int8]) -> Bytes:
    """Blocks (N, 34): the inverse of `split_q8_0`."""
    return np.concatenate([_half_bytes(scales[:, None]), codes.view(np.uint8)], axis=1)


def join_q4_0(scales: Floats, codes: NDArray[np.int8]) -> Bytes:
    """Blocks (N, 18): the inverse of `split_q4_0`."""
    half = BLOCK // 2
    q = (codes + np.int8(8)).view(np.uint8)
    return np.concatenate([_half_bytes(scales[:, None]), q[:, :half] | (q[:, half:] << 4)], axis=1)


def _encode_q8_0(x: Floats) -> Bytes:
    scale = np.abs(x).max(axis=1, keepdims=True) / np.float32(127)
    inverse = _inverse(scale)
    scaled = x * inverse
    q = np.trunc(scaled + np.copysign(np.float32(0.5), scaled)).astype(np.int8)
    return join_q8_0(scale[:, 0], q)


def _encode_q4_0(x: Floats) -> Bytes:
    largest = np.take_along_axis(x, np.abs(x).argmax(axis=1)[:, None], axis=1)
    scale = largest / np.float32(-8)
    inverse = _inverse(scale)
    q = np.minimum(15, np.trunc(x * inverse + np.float32(8.5))).astype(np.int8)
    return join_q4_0(scale[:, 0], q - np.int8(8))


def _inverse(scale: Floats) -> Floats:
    """1 / scale; 0 for a scale that float16 holds as 0 and whose inverse may be too large."""
    return np.divide(1, scale, out=np.zeros_like(scale), where=np.abs(scale) > 1e-30)


def _decode_q8_0(raw: Bytes) -> Floats:
    scales, q = split_q8_0(raw)
    return scales[:, None] * q


def _decode_q4_0(raw: Bytes) -> Floats:
    scales, q = split_q4_0(raw)
    return scales[:, None] * q


def _scales(raw: Bytes) -> Floats:
    return np.ascontiguousarray(raw[:, :2]).view(np.float16)[:, 0].astype(np.float32)


def _half_bytes(scale: Floats) -> Bytes:
    with np.errstate(over="ignore"):
        half = scale.astype(np.float16)
    if not np.isfinite(half).all():
        raise ValueError("there are numbers too large for blocks with scales in float16")
    return half.view(np.uint8)


def _encode_bf16(x: Floats) -> Bytes:
    bits = x.view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16).view(np.uint8)  # to nearest even


def _encode_f16(x: Floats) -> Bytes:
    with np.errstate(over="ignore"):
        half = x.astype(np.float16)
    if not np.isfinite(half).all():
        raise ValueError("F16: there are numbers above 65,504; take BF16 or F32")
    return half.view(np.uint8)


def _decode_bf16(raw: Bytes) -> Floats:
    return (raw.view(np.uint16).astype(np.uint32) << 16).view(np.float32)


TYPES = {
    kind.name: kind
    for kind in (
        BlockType("F32", 0, 1, 4, lambda x: x.view(np.uint8), lambda raw: raw.view(np.float32)),
        BlockType("F16", 1, 1, 2, _encode_f16, lambda raw: raw.view(np.float16).astype(np.float32)),
        BlockType("BF16", 30, 1, 2, _encode_bf16, _decode_bf16),
        BlockType("Q8_0", 8, BLOCK, 34, _encode_q8_0, _decode_q8_0),
        BlockType("Q4_0", 2, BLOCK, 18, _encode_q4_0, _decode_q4_0),
    )
}
