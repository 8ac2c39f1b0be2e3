"""llama.cpp as an independent reader of our files: its logits, its ids, its quantiser."""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest

llama_cpp = pytest.importorskip(
    "llama_cpp",
    reason="needs llama-cpp-python: pip install -c constraints.txt -e '.[peers]' (compiles for minutes)",
)
FILE_TYPES = {
    "F32": llama_cpp.LLAMA_FTYPE_ALL_F32, "F16": llama_cpp.LLAMA_FTYPE_MOSTLY_F16,
    "BF16": llama_cpp.LLAMA_FTYPE_MOSTLY_BF16, "Q8_0": llama_cpp.LLAMA_FTYPE_MOSTLY_Q8_0,
    "Q4_0": llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_0,
}  # fmt: skip


@contextlib.contextmanager
def opened(file: Path, context: int = 256) -> Iterator[llama_cpp.Llama]:
    model = llama_cpp.Llama(
        str(file), n_ctx=context, n_threads=1, n_threads_batch=1, logits_all=True, verbose=False
    )
    try:
        yield model
    finally:
        model.close()


def logits(model: llama_cpp.Llama, tokens: Sequence[int]) -> np.ndarray:
    """(T, V) after each token of a text."""
    model.reset()
    model.eval([int(token) for token in tokens])
    return np.array(model.scores[: len(tokens)])


def greedy(model: llama_cpp.Llama, prompt: Sequence[int], count: int, vocabulary: int) -> list[int]:
    """Up to </s>. Ids from `vocabulary` on are rows of the embedding without a piece."""
    model.reset()
    model.eval(list(prompt))
    drawn: list[int] = []
    while len(drawn) < count and drawn[-1:] != [2]:
        drawn.append(int(model.scores[model.n_tokens - 1, :vocabulary].argmax()))
        model.eval(drawn[-1:])
    return drawn


def encode(model: llama_cpp.Llama, text: str) -> list[int]:
    return [int(token) for token in model.tokenize(text.encode(), add_bos=True, special=False)]


def quantise(source: Path, target: Path, kind: str, pure: bool) -> None:
    """By llama.cpp's own quantiser; `pure` gives all matrices the type, by default a few get a better one."""
    options = llama_cpp.llama_model_quantize_default_params()
    options.ftype, options.pure, options.nthread = FILE_TYPES[kind], pure, 1
    assert (
        llama_cpp.llama_model_quantize(str(source).encode(), str(target).encode(), ctypes.byref(options)) == 0
    )
