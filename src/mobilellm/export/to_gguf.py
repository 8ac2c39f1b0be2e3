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


def export_gguf(
    source: str | Path,
    path: str | Path,
    kind: str = "Q8_0",
    embedding_kind: str | None = None,
    unroll: bool = False,
    say: Callable[[str], None] = lambda notice: None,
) -> dict[str, str]:
    """Write `path` from a model directory, a run or a Hub id, in any layout that `mobilellm.load` reads.

    `kind` is the type of the blocks' matrices, `embedding_kind` that of embedding and head (by default the
    same). `unroll` stores a shared block once for every time it runs, for readers without sharing. Returns
    the tensors that stayed in a wider type, and why. Raises ValueError and FileNotFoundError, one line each.
    """
    roles = Roles(_type(kind), _type(embedding_kind or kind))
    directory = hub.resolve(source, say)
    weights = checkpoint.read_weights(directory)
    tokenizer = api.read_tokenizer(directory, weights.config)
    if tokenizer is None:
        raise FileNotFoundError(f"{source}: has no tokenizer, and a .gguf file needs one to read text")
    model = checkpoint.build(weights, None, "cpu")
    named = dict(model.named_parameters())
    config = model.config.unrolled() if unroll else model.config

    def weight(name: str) -> NDArray[np.float32]:
        values: NDArray[np.float32] = (
            named[_stored_name(name, model.config.schedule, unroll)].detach().float().numpy()
        )
        return values

    template = directory / "chat_template.jinja"
    return gguf_model.write_model(
        path, config, weight, tokenizer, roles, directory.name,
        template.read_text(encoding="utf-8") if template.is_file() else None,
    )  # fmt: skip


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
