"""Schemes: which matrix of a model is stored in which format, and what is rounded before products.

    name    blocks' matrices   embedding, head   activations           for
    q8_0    q8_0               q8_0              8 bits, 32 a scale    GGUF: our runtime, llama.cpp
    q4_0    q4_0               q4_0 (or q8_0)    8 bits, 32 a scale    GGUF
    8da4w   int4, group 32     int8 (or int4)    8 bits, asymmetric    ExecuTorch with XNNPACK
    int8    int8               int8              as they are           weight-only, anywhere
    w8a8    int8               int8              8 bits, symmetric     the paper's Table 15

Keys and values stay as they are unless `kv` is asked for; they are then rounded to 8 bits for each token and
head (8da4w: asymmetric, as ExecuTorch's quantised cache). A matrix whose rows are no whole groups takes the
next wider format: float16 in GGUF, int8 in 8da4w. Norms are float32.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache
from typing import NamedTuple

import torch

from mobilellm.config import ModelConfig
from mobilellm.model.quantized import Quantization
from mobilellm.model.rounding import BLOCKS, TOKEN, TOKEN_ASYMMETRIC, Rounding
from mobilellm.model.transformer import MobileLLM
from mobilellm.quant.formats import INT4, INT8, Q4_0, Q8_0, WeightFormat, int4_in_groups

EMBEDDING_NAMES = ("model.embed_tokens.weight", "lm_head.weight")


class Size(NamedTuple):
    bytes: int
    """Of all tensors: codes, scales, and what is not quantised."""
    weights: int

    @property
    def bits_per_weight(self) -> float:
        return 8 * self.bytes / self.weights


@dataclass(frozen=True)
class Scheme:
    """How a whole model is quantised."""

    name: str
    linear: WeightFormat
    embedding: WeightFormat
    activations: Rounding | None
    kv: Rounding | None = None

    @property
    def in_gguf(self) -> bool:
        return self.linear.in_gguf

    def formats(self, config: ModelConfig) -> dict[str, WeightFormat | None]:
        """The format of every matrix of a model by its checkpoint name; None for one that stays float16."""
        found: dict[str, WeightFormat | None] = {}
        for name, (_, columns) in _matrices(config).items():
            wanted = self.embedding if name in EMBEDDING_NAMES else self.linear
            found[name] = wanted if wanted.fits(columns) else None if self.in_gguf else INT8
        return found

    def wider(self, config: ModelConfig) -> dict[str, str]:
        """Matrices in a wider format than their role's, and why."""
        shapes, found = _matrices(config), {}
        for name, used in self.formats(config).items():
            wanted = self.embedding if name in EMBEDDING_NAMES else self.linear
            if used != wanted:
                kind = "float16" if used is None else used.name
                found[name] = f"{kind}, because rows of {shapes[name][1]} are no multiple of {wanted.group}"
        return found

    def size(self, config: ModelConfig) -> Size:
        """Bytes of a model's tensors, before anything is made."""
        total = weights = 0
        formats = self.formats(config)
        for name, shape in _shapes(config).items():
            count = shape.numel()
            weights += count
            if name not in formats:
                total += 4 * count
            else:
                kind = formats[name]
                total += 2 * count if kind is None else kind.nbytes(shape[0], shape[1])
        return Size(total, weights)

    def described(self, size: int) -> Quantization:
        return Quantization(
            self.name, self.linear.name, self.embedding.name, self.activations, self.kv, bytes=size
        )


SCHEMES = {
    scheme.name: scheme
    for scheme in (
        Scheme("q8_0", Q8_0, Q8_0, BLOCKS),
        Scheme("q4_0", Q4_0, Q4_0, BLOCKS),
        Scheme("8da4w", INT4, INT8, TOKEN_ASYMMETRIC),
        Scheme("int8", INT8, INT8, None),
        Scheme("w8a8", INT8, INT8, TOKEN),
    )
}
_EMBEDDINGS = {"q8_0": (Q8_0,), "q4_0": (Q4_0, Q8_0), "8da4w": (INT8, INT4), "int8": (INT8,), "w8a8": (INT8,)}


def scheme(name: str, embedding: str | None = None, group: int | None = None, kv: bool = False) -> Scheme:
    """A scheme by name, changed as asked: the format of embedding and head, int4's group, keys and values.

    Raises ValueError for what does not exist or does not go together.
    """
    if name not in SCHEMES:
        raise ValueError(f"scheme = {name!r} is not known; choose one of {', '.join(SCHEMES)}")
    chosen = SCHEMES[name]
    if embedding is not None:
        possible = {kind.name: kind for kind in _EMBEDDINGS[name]}
        if embedding not in possible:
            raise ValueError(
                f"embedding = {embedding} does not go with {name}; choose {' or '.join(possible)}"
            )
        chosen = replace(chosen, embedding=possible[embedding])
    if group is not None:
        if name != "8da4w":
            fixed = chosen.linear.group
            reason = "has a scale a row" if fixed is None else f"has blocks of {fixed}"
            raise ValueError(f"group = {group} does not go with {name}, which {reason}; leave it out")
        if group < 32 or group % 32:
            raise ValueError(f"group = {group} must be a multiple of 32, as XNNPACK wants it; 32 is the best")
        linear = int4_in_groups(group)
        chosen = replace(
            chosen, linear=linear, embedding=linear if chosen.embedding is INT4 else chosen.embedding
        )
    if kv:
        chosen = replace(chosen, kv=TOKEN_ASYMMETRIC if name == "8da4w" else TOKEN)
    return chosen


def check_widths(chosen: Scheme, config: ModelConfig) -> None:
    """Refuse groups above 32 that do not divide a model's rows. Raises ValueError with the better choice.

    With groups of 32, which divide every published width, such rows take a wider format instead.
    """
    grouped = {
        name: columns
        for name, (_, columns) in _matrices(config).items()
        if (chosen.embedding if name in EMBEDDING_NAMES else chosen.linear).group is not None
    }
    group = chosen.linear.group
    if group is None or group <= 32:
        return
    for name, columns in grouped.items():
        if columns % group:
            smaller = (
                size for size in range(group - 32, 32, -32) if not any(c % size for c in grouped.values())
            )
            raise ValueError(
                f"group = {group} does not divide the rows of {columns} of {name}; take {next(smaller, 32)}, "
                "or leave it out: 32 divides every published width, and smaller groups lose less"
            )


def _matrices(config: ModelConfig) -> dict[str, torch.Size]:
    return {name: shape for name, shape in _shapes(config).items() if len(shape) == 2}


@cache
def _shapes(config: ModelConfig) -> dict[str, torch.Size]:
    with torch.device("meta"):
        model = MobileLLM(config)
    return {name: parameter.shape for name, parameter in model.named_parameters()}
