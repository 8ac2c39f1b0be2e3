"""A .gguf file that reads and writes text: `mobilellm.runtime.load`."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from mobilellm import gguf_model
from mobilellm.completion import (
    Completion,
    FinishReason,
    NewToken,
    Piece,
    Until,
    check_prompts,
    completions,
    room_for,
    stream_text,
)
from mobilellm.config import ModelConfig
from mobilellm.gguf import read_gguf
from mobilellm.runtime import engine as native
from mobilellm.runtime.reference import ReferenceModel
from mobilellm.sampling import Sampler, Sampling
from mobilellm.tokenizer import EOS_ID, Tokenizer

Floats = NDArray[np.float32]
_log = logging.getLogger(__name__)

PREFILL_CHUNK = 256
"""Prompt tokens at a time: the attention of each against all before it is held at once."""


class Engine(Protocol):
    """What runs a model: ReferenceModel or NativeModel, whose caches are their own."""

    config: ModelConfig

    def new_cache(self, capacity: int | None = None) -> Any: ...

    def forward(self, tokens: NDArray[np.integer], cache: Any) -> Floats: ...

    def forward_batch(self, feeds: Sequence[tuple[NDArray[np.integer], Any]]) -> Floats: ...

    def logits(self, states: Floats) -> Floats: ...


@dataclass(frozen=True)
class RuntimeModel:
    """A model, its tokenizer and its chat template, as they were in the file."""

    engine: Engine
    tokenizer: Tokenizer
    source: str
    chat_template: str | None = None

    def stream(
        self,
        prompts: str | Sequence[str],
        sampling: Sampling | None = None,
        max_new_tokens: int | None = None,
        stop: Sequence[str] = (),
    ) -> Iterator[Piece]:
        """Generate for one prompt or several and yield every token's text, never half a character.

        Greedy unless told otherwise. Raises at once ValueError for a prompt that does not fit the context.
        """

        def tokens(encoded: list[list[int]], until: Until) -> Iterator[NewToken]:
            return self.generate_tokens(encoded, sampling, max_new_tokens, until)

        return stream_text(self.tokenizer, prompts, stop, tokens)

    def generate(
        self,
        prompts: str | Sequence[str],
        sampling: Sampling | None = None,
        max_new_tokens: int | None = None,
        stop: Sequence[str] = (),
    ) -> list[Completion]:
        """As `stream`, put together: one Completion a prompt."""
        count = 1 if isinstance(prompts, str) else len(prompts)
        return completions(self.stream(prompts, sampling, max_new_tokens, stop), count)

    def generate_tokens(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling | None = None,
        max_new_tokens: int | None = None,
        until: Until | None = None,
    ) -> Iterator[NewToken]:
        """Yield the new tokens of every prompt as they are drawn, row by row within a step.

        A row ends with EOS, when `until(row, token)` says so ("stop"), after `max_new_tokens` ("length"), or
        when the context is full ("context"). Raises ValueError at once for prompts that do not fit.
        """
        config = self.engine.config
        check_prompts(prompts, config.max_position_embeddings, config.vocab_size, max_new_tokens)
        rows = [
            _Row(self, row, prompt, sampling or Sampling(), max_new_tokens)
            for row, prompt in enumerate(prompts)
        ]
        return _draw(self.engine, rows, until)


def load(
    path: str | Path,
    threads: int | None = None,
    engine: Literal["auto", "native", "reference"] = "auto",
    say: Callable[[str], None] = _log.warning,
) -> RuntimeModel:
    """Open a .gguf file. Raises FileNotFoundError, or ValueError with one line naming file and fault.

    `engine`: the compiled one, the readable one, or "auto": the compiled one where it could be compiled, else
    the readable one and a line to `say`. `threads` of the compiled one: by default one a core, four at most.
    """
    if engine not in ("auto", "native", "reference"):
        raise ValueError(f"engine = {engine!r} is not known; choose auto, native or reference")
    file = read_gguf(path)
    tokenizer = gguf_model.read_tokenizer(file)
    if engine == "auto" and (fault := native.missing()) is not None:
        say(f"the native engine was not compiled ({fault}); the model runs in numpy, many times slower")
        engine = "reference"
    runs = ReferenceModel(file) if engine == "reference" else native.NativeModel(file, threads)
    return RuntimeModel(runs, tokenizer, str(path), gguf_model.chat_template(file))


def _draw(engine: Engine, rows: list[_Row], until: Until | None) -> Iterator[NewToken]:
    while rows:
        logits = engine.logits(_states(engine, rows))
        for row, its_logits in zip(tuple(rows), logits, strict=True):
            drawn = row.draw(its_logits, until)
            if drawn.finish:
                rows.remove(row)
            yield drawn


def _states(engine: Engine, rows: Sequence[_Row]) -> Floats:
    """Final states (rows, E) after what each row has to be fed: prompts in chunks, tokens all at once."""
    feeds = [(np.array(row.fed), row.cache) for row in rows]
    if all(len(fed) == 1 for fed, _ in feeds):
        return engine.forward_batch(feeds)
    last = []
    for fed, cache in feeds:
        for start in range(0, len(fed), PREFILL_CHUNK):
            states = engine.forward(fed[start : start + PREFILL_CHUNK], cache)
        last.append(states[-1])
    return np.stack(last)


class _Row:
    """One sequence in flight."""

    def __init__(
        self, model: RuntimeModel, number: int, prompt: Sequence[int], sampling: Sampling, most: int | None
    ) -> None:
        self._number = number
        self._vocabulary = model.tokenizer.vocab_size  # the embedding may have more rows, which mean nothing
        context = model.engine.config.max_position_embeddings
        self._left, self._at_the_end = room_for(len(prompt), most, context)
        self.fed: Sequence[int] = prompt
        """What the cache does not hold yet."""
        self._sampler = Sampler(sampling, prompt, number)
        self._new_cache = model.engine.new_cache
        self._capacity = len(prompt) + self._left - 1  # the last token drawn is never fed and needs no room

    @functools.cached_property
    def cache(self) -> Any:
        return self._new_cache(self._capacity)

    def draw(self, logits: Floats, until: Until | None) -> NewToken:
        token = self._sampler(logits[: self._vocabulary])
        self.fed, self._left = [token], self._left - 1
        finish: FinishReason | None = None
        if token == EOS_ID:
            finish = "eos"
        elif until is not None and until(self._number, token):
            finish = "stop"
        elif self._left == 0:
            finish = self._at_the_end
        return NewToken(self._number, token, finish)
