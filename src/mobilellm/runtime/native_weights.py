"""A .gguf file's tensors as native/engine.h takes them, and how they come into the engine's memory."""

from __future__ import annotations

import ctypes

import numpy as np
from numpy.typing import NDArray

from mobilellm.config import ModelConfig
from mobilellm.gguf import GGUF
from mobilellm.runtime.native_library import Library, Shape, Tensor

_MATRICES = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")
_NORMS = ("attn_norm", "ffn_norm")
_MOST_ROWS = 2**31 - 1
_HEAD_PIECES = 8
"""In which the head is brought to memory, so that the file's bytes and ours are not there twice."""


def shape(config: ModelConfig) -> Shape:
    return Shape(
        config.vocab_size, config.hidden_size, config.intermediate_size, config.num_layers, config.num_heads,
        config.num_kv_heads, config.head_dim, config.num_steps, config.rms_norm_eps, config.rope_theta,
    )  # fmt: skip


def matrices(file: GGUF, config: ModelConfig) -> ctypes.Array[Tensor]:
    """Embedding, the blocks' matrices, head: where they lie in the mapped file.

    Raises ValueError for one with more rows or columns than the engine counts.
    """
    names = [f"blk.{block}.{name}.weight" for block in range(config.num_layers) for name in _MATRICES]
    tensors = [_tensor(file, name) for name in ("token_embd.weight", *names, _head_name(config))]
    return (Tensor * len(tensors))(*tensors)


def norms(file: GGUF, config: ModelConfig) -> NDArray[np.float32]:
    """All blocks' two each, then the final one, (2 × num_layers + 1) × E numbers in a row."""
    names = [f"blk.{block}.{name}.weight" for block in range(config.num_layers) for name in _NORMS]
    return np.concatenate([file.array(name) for name in (*names, "output_norm.weight")])


def fill(library: Library, handle: int, file: GGUF, config: ModelConfig) -> None:
    """Bring all matrices into the engine's arena, and let go of what the file's pages took meanwhile."""
    for block in range(config.num_layers):
        library.fill(handle, block, 0, 1)
        for name in _MATRICES:
            _forget(file, f"blk.{block}.{name}.weight")
    for piece in range(_HEAD_PIECES):
        library.fill(handle, config.num_layers, piece, _HEAD_PIECES)
        _forget(file, _head_name(config), (piece + 1) / _HEAD_PIECES)
    file.let_go(0, len(file.data))


def _tensor(file: GGUF, name: str) -> Tensor:
    info = file.tensors[name]
    rows, columns = info.shape
    if max(rows, columns) > _MOST_ROWS:
        raise ValueError(
            f"{file.path}: tensor {name!r} has shape {list(info.shape)}; sides go up to 2^31 - 1"
        )
    return Tensor(file.raw(name).ctypes.data, info.type.number, rows, columns)


def _head_name(config: ModelConfig) -> str:
    return "token_embd.weight" if config.tie_word_embeddings else "output.weight"


def _forget(file: GGUF, name: str, share: float = 1) -> None:
    """Let the system drop the mapped pages of a tensor's first part from this process's memory.

    They can be read again.
    """
    info = file.tensors[name]
    file.let_go(info.offset, int(info.nbytes * share))
