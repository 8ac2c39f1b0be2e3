"""The published shapes (MobileLLM, Table 9) and small ones for CPUs and tests, as one readable table."""

from __future__ import annotations

from typing import NamedTuple

from mobilellm.config import ModelConfig


class _Shape(NamedTuple):
    layers: int
    heads: int
    kv_heads: int
    hidden: int
    intermediate: int
    repeats: int = 1
    vocab: int = 32_000
    context: int = 2_048
    head_dim: int = 64
    init: float = 0.02


_SHAPES = {
    #                layers heads kv hidden  ffn  repeats
    "125m": _Shape(      30,    9, 3,   576, 1536),
    "350m": _Shape(      32,   15, 5,   960, 2560),
    "600m": _Shape(      40,   18, 6,  1152, 3072),
    "1b": _Shape(        54,   20, 5,  1280, 3584),
    "1.5b": _Shape(      54,   25, 5,  1600, 4352),
    "ls-125m": _Shape(   30,    9, 3,   576, 1536, 2),
    "ls-350m": _Shape(   32,   15, 5,   960, 2560, 2),
    # Ours, not published. A narrow model needs larger initial weights: at 0.02 tiny-ls learns next to nothing
    # in its few hundred steps (docs/log.md).
    "tiny-ls": _Shape(    4,    2, 1,   128,  344, 2, vocab=2_048, context=512, init=0.06),
    "tiny": _Shape(       8,    4, 2,   256,  704, 1, vocab=4_096, context=512),
    "test-ls": _Shape(    2,    4, 2,    64,  176, 2, vocab=384, context=128, head_dim=16),
    "test": _Shape(       2,    4, 2,    64,  176, 1, vocab=384, context=128, head_dim=16),
}  # fmt: skip

PUBLISHED = ("125m", "350m", "600m", "1b", "1.5b", "ls-125m", "ls-350m")
"""Names of the shapes in the paper and on the model card, in the card's order."""


def preset(name: str) -> ModelConfig:
    """The config of a preset. Names ignore case and a leading "mobilellm-". Raises ValueError."""
    key = name.lower().removeprefix("mobilellm-")
    if key.endswith("-layer-share"):  # the Hub's spelling
        key = "ls-" + key.removesuffix("-layer-share")
    if key not in _SHAPES:
        raise ValueError(f"preset {name!r} is not known; presets are {', '.join(_SHAPES)}")
    shape = _SHAPES[key]
    return ModelConfig(
        vocab_size=shape.vocab,
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_layers=shape.layers,
        num_heads=shape.heads,
        num_kv_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        max_position_embeddings=shape.context,
        initializer_range=shape.init,
        repeats=shape.repeats,
    )


def preset_names() -> tuple[str, ...]:
    return tuple(_SHAPES)
