"""A .gguf file that reads and writes text: `mobilellm.runtime.load`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mobilellm import gguf_model
from mobilellm.completion import (
    Completion,
    FinishReason,
    NewToken,
    Piece,
    Until,
    completions,
    stream_text,
)
from mobilellm.gguf import read_gguf
from mobilellm.runtime.reference import Cache, ReferenceModel
from mobilellm.sampling import Sampler, Sampling
from mobilellm.tokenizer import EOS_ID, Tokenizer

PREFILL_CHUNK = 256
"""Prompt tokens at a time: the attention of each against all before it is held at once."""


@dataclass(frozen=True)
class RuntimeModel:
    """A model, its tokenizer and its chat template, as they were in the file."""

    engine: ReferenceModel
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
        context = self.engine.config.max_position_embeddings
        if not prompts:
            raise ValueError("generate: no prompt given")
        if max_new_tokens is not None and max_new_tokens < 1:
            raise ValueError(f"generate: max_new_tokens = {max_new_tokens} must be at least 1")
        for row, prompt in enumerate(prompts):
            if not prompt:
                raise ValueError(f"generate: prompt {row} has no tokens; it needs at least one (BOS)")
            if len(prompt) >= context:
                raise ValueError(
                    f"generate: prompt {row} has {len(prompt)} tokens and the model's context is {context}; "
                    f"shorten it to at most {context - 1}"
                )
        rows = [
            _Row(self, row, prompt, sampling or Sampling(), max_new_tokens)
            for row, prompt in enumerate(prompts)
        ]
        return _draw(rows, until)


def load(path: str | Path) -> RuntimeModel:
    """Open a .gguf file. Raises FileNotFoundError, or ValueError with one line naming file and fault."""
    file = read_gguf(path)
    tokenizer = gguf_model.read_tokenizer(file)
    return RuntimeModel(ReferenceModel(file), tokenizer, str(path), gguf_model.chat_template(file))


def _draw(rows: list[_Row], until: Until | None) -> Iterator[NewToken]:
    while rows:
        for row in tuple(rows):
            drawn = row.next(until)
            if drawn.finish:
                rows.remove(row)
            yield drawn


class _Row:
    """One sequence in flight."""

    def __init__(
        self, model: RuntimeModel, number: int, prompt: Sequence[int], sampling: Sampling, most: int | None
    ) -> None:
        self._engine, self._number = model.engine, number
        self._vocabulary = model.tokenizer.vocab_size  # the embedding may have more rows, which mean nothing
        room = model.engine.config.max_position_embeddings - len(prompt)
        fits = most is not None and most <= room
        self._left = most if most is not None and fits else room
        self._at_the_end: FinishReason = "length" if fits else "context"
        self._fed: Sequence[int] = prompt
        self._sampler = Sampler(sampling, prompt, number)
        self._cache: Cache | None = None

    def next(self, until: Until | None) -> NewToken:
        # The last token drawn is never fed and needs no room.
        cache = self._cache = self._cache or self._engine.new_cache(len(self._fed) + self._left - 1)
        fed = np.array(self._fed)
        for start in range(0, len(fed), PREFILL_CHUNK):
            states = self._engine.forward(fed[start : start + PREFILL_CHUNK], cache)
        token = self._sampler(self._engine.logits(states[-1:])[0, : self._vocabulary])
        self._fed, self._left = [token], self._left - 1
        finish: FinishReason | None = None
        if token == EOS_ID:
            finish = "eos"
        elif until is not None and until(self._number, token):
            finish = "stop"
        elif self._left == 0:
            finish = self._at_the_end
        return NewToken(self._number, token, finish)
