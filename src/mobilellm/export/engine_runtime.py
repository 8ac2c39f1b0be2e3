"""A .gguf file in this package's own runtime: the compiled engine, or numpy where nothing was compiled."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mobilellm import __version__
from mobilellm.chat_template import ChatTemplate, Message
from mobilellm.config import ModelConfig
from mobilellm.export.questions import Floats
from mobilellm.runtime.generation import PREFILL_CHUNK, Engine
from mobilellm.runtime.session import RuntimeModel, load


class EngineRuntime:
    """See `Runtime`."""

    def __init__(self, model: RuntimeModel) -> None:
        self._model = model
        engine: Any = model.engine
        self.name = f"mobilellm.runtime {__version__} ({getattr(engine, 'isa', 'reference')})"

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        return self._model.tokenizer.encode_batch(texts)

    def chat(self, messages: Sequence[Message]) -> list[int] | None:
        template = self._model.chat_template
        return None if template is None else ChatTemplate(template, self._model.tokenizer).prompt(messages)

    def logits(self, tokens: Sequence[int]) -> Floats:
        return self._fed(tokens, PREFILL_CHUNK)

    def steps(self, tokens: Sequence[int]) -> Floats:
        return self._fed(tokens, 1)

    def greedy(self, prompt: Sequence[int], most: int, forced: tuple[int, int] | None = None) -> list[int]:
        model = self._model
        if forced is not None:
            model = dataclasses.replace(model, engine=_Wanting(model.engine, *forced))
        drawn = model.generate_tokens([prompt], max_new_tokens=most)
        return [new.token for new in drawn if new.token is not None]  # None is a cancelled row's

    def _fed(self, tokens: Sequence[int], at_once: int) -> Floats:
        engine, ids = self._model.engine, np.array(tokens)
        cache = engine.new_cache(len(ids))
        return np.concatenate(
            [
                engine.logits(engine.forward(ids[start : start + at_once], cache))
                for start in range(0, len(ids), at_once)
            ]
        )


@contextmanager
def engine_runtime(path: Path) -> Iterator[EngineRuntime]:
    """Raises ValueError for a file that cannot be run."""
    yield EngineRuntime(load(path))


class _Wanting:
    """An engine that wants one token at one step above all others."""

    def __init__(self, engine: Engine, step: int, token: int) -> None:
        self._engine, self._left, self._token = engine, step, token
        self.config: ModelConfig = engine.config

    def new_cache(self, capacity: int | None = None) -> Any:
        return self._engine.new_cache(capacity)

    def forward(self, tokens: NDArray[np.integer], cache: Any) -> Floats:
        return self._engine.forward(tokens, cache)

    def forward_batch(self, feeds: Sequence[tuple[NDArray[np.integer], Any]]) -> Floats:
        return self._engine.forward_batch(feeds)

    def logits(self, states: Floats) -> Floats:
        logits = self._engine.logits(states)
        if self._left == 0:
            logits[:, self._token] = logits.max() + 1
        self._left -= 1
        return logits
