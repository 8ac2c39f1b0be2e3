"""A .gguf file of a preset's shape with random weights, which takes as long to run as a trained one.

The vocabulary is as large as the preset's, since reading it is part of every start.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mobilellm import gguf_model
from mobilellm.config import ModelConfig
from mobilellm.gguf_blocks import TYPES
from mobilellm.gguf_model import Roles, layout
from mobilellm.presets import preset
from mobilellm.sentencepiece_model import LAYOUT_HEAD, SPACE
from mobilellm.tokenizer import Tokenizer
from mobilellm.tokenizer_merges import merges_of

_LETTERS = "abcdefghijklmnopqrstuvwxyz"


def shape_and_type(name: str) -> tuple[str, str]:
    """ "125m:Q8_0" -> ("125m", "Q8_0"). Raises ValueError for a shape or a type that is not known."""
    shape, colon, kind = name.partition(":")
    if not colon:
        raise ValueError(f"{name!r} is no file; for random weights write SHAPE:TYPE, e.g. 125m:Q8_0")
    preset(shape)
    if kind.upper() not in TYPES:
        raise ValueError(f"{name!r}: type {kind!r} is not known; choose one of {', '.join(TYPES)}")
    return shape, kind.upper()


def write_random_model(path: Path, shape: str, kind: str) -> None:
    """The same weights for the same shape, whatever the type. Needs the package `gguf`."""
    config, roles = preset(shape), Roles(TYPES[kind], TYPES[kind])
    gguf_model.write_model(
        path, config, random_weights(config), made_tokenizer(config.vocab_size), roles, shape
    )


def random_weights(config: ModelConfig) -> Callable[[str], NDArray[np.float32]]:
    """A tensor by its checkpoint name: norms are 1, rows of matrices have length 1 on average."""
    shapes = {name: stored.shape for name, stored in layout(config)}

    def weight(name: str) -> NDArray[np.float32]:
        shape = shapes[name]
        if len(shape) == 1:
            return np.ones(shape, np.float32)
        random = np.random.default_rng(zlib.crc32(name.encode()))
        return random.standard_normal(shape, np.float32) * np.float32(shape[-1] ** -0.5)

    return weight


def made_tokenizer(size: int) -> Tokenizer:
    """A vocabulary of `size` pieces: bytes, a space, letters, and the shortest words of letters.

    There are about as many merges as in a trained one of that size.
    """
    first = (SPACE, *_LETTERS)[: size - len(LAYOUT_HEAD)]
    if not first:
        raise ValueError(f"a vocabulary of {size} has no room for {len(LAYOUT_HEAD) + 1} pieces, the least")
    pieces = list(first)
    for piece in pieces:  # it grows meanwhile
        room = size - len(LAYOUT_HEAD) - len(pieces)
        pieces += [piece + letter for letter in _LETTERS[:room]]
        if room <= len(_LETTERS):
            break
    pieces = [*LAYOUT_HEAD, *pieces]
    return Tokenizer(pieces, merges_of(pieces[len(LAYOUT_HEAD) + len(first) :], pieces))
