"""A model directory as one .gguf file."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mobilellm import gguf_model
from mobilellm.gguf_blocks import TYPES, BlockType
from mobilellm.gguf_model import Roles
from mobilellm.model import api, checkpoint, hub
from mobilellm.model.checkpoint import Weights
from mobilellm.quant.formats import FORMATS
from mobilellm.quant.schemes import EMBEDDING_NAMES


def export_gguf(
    source: str | Path,
    path: str | Path,
    kind: str | None = None,
    embedding_kind: str | None = None,
    unroll: bool = False,
    say: Callable[[str], None] = lambda notice: None,
) -> dict[str, str]:
    """Write `path` from a model directory, a run or a Hub id, in any layout that `mobilellm.load` reads.

    `kind` is the type of the blocks' matrices (by default Q8_0), `embedding_kind` that of embedding and head
    (by default the same). A model quantised in GGUF's formats keeps its own, bit for bit. `unroll` stores a
    shared block once for every time it runs, for readers without sharing. Returns the tensors that stayed in
    a wider type, and why. Raises ValueError and FileNotFoundError, one line each.
    """
    directory = hub.resolve(source, say)
    weights = checkpoint.read_weights(directory)
    roles = roles_of(source, weights, kind, embedding_kind)
    return write_gguf(path, weights, directory, roles, unroll)


def write_gguf(
    path: str | Path, weights: Weights, directory: Path, roles: Roles, unroll: bool = False
) -> dict[str, str]:
    """Write weights that are in memory, with tokenizer, name and chat template of a model directory.

    Returns and raises as `export_gguf`.
    """
    tokenizer = api.read_tokenizer(directory, weights.config)
    if tokenizer is None:
        raise FileNotFoundError(f"{directory}: has no tokenizer, and a .gguf file needs one to read text")
    template = directory / "chat_template.jinja"
    config, quantized = weights.config, weights.quantized
    named = dict(checkpoint.build(weights, None, "cpu").named_parameters())

    def weight(name: str) -> NDArray[np.float32] | NDArray[np.uint8]:
        stored = _stored_name(name, config.schedule, unroll)
        if quantized is not None and (matrix := quantized.matrices.get(stored)) is not None:
            role = quantized.quantization
            kind = role.embedding if stored in EMBEDDING_NAMES else role.linear
            return FORMATS[kind].file_bytes(matrix)
        values: NDArray[np.float32] = named[stored].detach().float().numpy()
        return values

    written = config.unrolled() if unroll else config
    return gguf_model.write_model(
        path, written, weight, tokenizer, roles, directory.name,
        template.read_text(encoding="utf-8") if template.is_file() else None,
    )  # fmt: skip


def roles_of(
    source: str | Path, weights: Weights, kind: str | None = None, embedding_kind: str | None = None
) -> Roles:
    """The types of a file: those asked for, or those a quantised model has. Raises ValueError."""
    if weights.quantized is None:
        kind = kind or "Q8_0"
        return Roles(_type(kind), _type(embedding_kind or kind))
    own = weights.quantized.quantization
    for option, asked, has in (("type", kind, own.linear), ("embedding_type", embedding_kind, own.embedding)):
        if has.upper() not in TYPES:
            raise ValueError(
                f"{source}: is quantised as {own.scheme}, which GGUF has no type for; quantise its source "
                "with --scheme q4_0 or q8_0"
            )
        if asked is not None and asked.upper() != has.upper():
            raise ValueError(f"{option} = {asked} would round {source} again, which is {has}; leave it out")
    return Roles(_type(own.linear), _type(own.embedding))


def _type(name: str) -> BlockType:
    if name.upper() not in TYPES:
        raise ValueError(f"type {name!r} is not known; choose one of {', '.join(TYPES)}")
    return TYPES[name.upper()]


def _stored_name(name: str, schedule: tuple[int, ...], unroll: bool) -> str:
    """The parameter behind a tensor of the file: block n of an unrolled file is that of step n."""
    head, layers, rest = name.partition("model.layers.")
    if not (layers and unroll):
        return name
    step, _, part = rest.partition(".")
    return f"{head}{layers}{schedule[int(step)]}.{part}"
