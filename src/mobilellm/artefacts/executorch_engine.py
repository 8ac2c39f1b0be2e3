"""A .pte program, run by ExecuTorch behind the interface of `runtime.generation.Engine`. Needs torch."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from mobilellm.artefacts import opening
from mobilellm.config import ModelConfig
from mobilellm.runtime.engine import CancelledError
from mobilellm.runtime.kv_cache import Room

Floats = NDArray[np.float32]
PROGRAM = opening.PROGRAM
DESCRIPTION = "mobilellm"
"""The method of a program that gives, as JSON, what it is: config, context, chunk, and how it is stored."""


class ExecutorchModel:
    """Its final states are the logits already: the program ends with the head.

    The program keeps keys and values itself, for one sequence. Several caches may be in flight all the same:
    one that takes its turn is read in again, as far as the program does not hold it.
    """

    def __init__(self, file: Path) -> None:
        """Raises FileNotFoundError, or ValueError with one line naming file and fault."""
        if not file.is_file():
            raise FileNotFoundError(f"{file}: no such program; name a directory that export wrote")
        load_operators()
        from executorch.runtime import Runtime, Verification

        self.file = file
        try:
            program = Runtime.get().load_program(file, verification=Verification.InternalConsistency)
            self.description = _described(program, file)
            self._forward = program.load_method("forward")
        except RuntimeError as error:
            raise ValueError(f"{file}: ExecuTorch cannot load it: {str(error).splitlines()[0]}") from None
        stored = ModelConfig.from_dict(self.description["config"], str(file))
        self.config = replace(stored, max_position_embeddings=self.description["context"])
        self.backend, self.types = "executorch", _types(self.description)
        self._held: list[int] = []
        self._cancelled = False

    def new_cache(self, capacity: int | None = None) -> ExecutorchCache:
        """An empty cache for `capacity` tokens, by default as many as the program holds."""
        return ExecutorchCache(self.config, capacity or self.config.max_position_embeddings)

    def forward(self, tokens: NDArray[np.integer], cache: ExecutorchCache) -> Floats:
        """Feed tokens (T,) and return the logits after each (T, V); the cache grows by T."""
        cache.reserve(tokens, self.config.vocab_size)
        self._cancelled = False
        before = cache.tokens[: cache.length]
        if self._held[: len(before)] != before:
            self._fed(before, 0)
        logits = self._fed(tokens.tolist(), len(before))
        cache.tokens = before + tokens.tolist()
        cache.length = len(cache.tokens)
        return logits

    def forward_batch(self, feeds: Sequence[tuple[NDArray[np.integer], ExecutorchCache]]) -> Floats:
        """Feed tokens (T_i,) each to its own cache; logits (sum of T_i, V)."""
        return np.concatenate([self.forward(tokens, cache) for tokens, cache in feeds])

    def logits(self, states: Floats) -> Floats:
        """The states (T, V) themselves."""
        return states

    def cancel(self) -> None:
        """From any thread: the `forward` that runs raises CancelledError after the tokens it has in hand."""
        self._cancelled = True

    def _fed(self, tokens: list[int], start: int) -> Floats:
        chunk, rows = self.description["chunk"], list[Floats]()
        self._held = self._held[:start]
        for first in range(0, len(tokens), chunk):
            if self._cancelled:
                raise CancelledError
            some = tokens[first : first + chunk]
            place = torch.tensor([start + first])
            (logits,) = self._forward.execute((torch.tensor([some]), place))
            rows.append(logits[0].numpy().copy())  # the program writes the next ones to the same place
            self._held += some
        return np.concatenate(rows)


class ExecutorchCache(Room):
    """The tokens of one sequence; keys and values are in the program, or can be made again."""

    def __init__(self, config: ModelConfig, capacity: int) -> None:
        super().__init__(config, capacity)
        self.tokens: list[int] = []


def load_operators() -> None:
    """Make operators known to torch.export and to ExecuTorch: those for language models, and of rounding."""
    quiet = logging.getLogger("torchao")
    level, quiet.level = quiet.level, logging.ERROR  # it tells of libraries for other devices
    try:
        import_module("executorch.extension.llm.custom_ops.custom_ops")
        import_module("torch.ao.quantization.fx._decomposed")
    finally:
        quiet.level = level


def _types(description: dict[str, Any]) -> str:
    """How matrices are stored, the blocks' first."""
    return "+".join(dict.fromkeys([description["type"], description["embedding_type"]]))


def _described(program: Any, file: Path) -> dict[str, Any]:
    if DESCRIPTION not in program.method_names or "forward" not in program.method_names:
        raise ValueError(f"{file}: was not written by mobilellm export; only such programs are run")
    (text,) = program.load_method(DESCRIPTION).execute(())
    described: dict[str, Any] = json.loads(text)
    return described
