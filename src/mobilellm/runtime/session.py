"""A .gguf file that reads and writes text, `mobilellm.runtime.load`; sessions, which keep what was read."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from mobilellm import gguf_tokenizer
from mobilellm.completion import Completion, NewToken, Piece, Until, completions, stream_text
from mobilellm.gguf import GGUF, read_gguf
from mobilellm.runtime import engine as native
from mobilellm.runtime.decoding import Decoding, Limit, limits
from mobilellm.runtime.generation import Engine, Generation, HeldTokens, Usage, advance, interrupt
from mobilellm.runtime.kv_cache import KVCacheType
from mobilellm.runtime.session_file import read_session, write_session
from mobilellm.sampling import Draw, Sampler, Sampling
from mobilellm.tokenizer import Tokenizer


@dataclass(frozen=True)
class RuntimeModel:
    """A model, its tokenizer and its chat template, as they were in the file."""

    engine: Engine
    tokenizer: Tokenizer
    source: str
    chat_template: str | None = None
    file: GGUF | None = None
    """None where it came from no .gguf file; its sessions are then not kept in files."""

    def __repr__(self) -> str:
        return f"<RuntimeModel of {self.source!r}: {type(self.engine).__name__}>"

    def stream(
        self,
        prompts: str | Sequence[str],
        sampling: Sampling | None = None,
        max_new_tokens: int | None = None,
        stop: Sequence[str] = (),
        decoding: Decoding | None = None,
    ) -> Iterator[Piece]:
        """Generate for one prompt or several and yield every token's text, never half a character.

        Greedy unless told otherwise. Raises at once ValueError for what does not fit the context, where
        `decoding` does not say what is to happen then.
        """

        def tokens(encoded: list[list[int]], until: Until) -> Iterator[NewToken]:
            return self.generate_tokens(encoded, sampling, max_new_tokens, until, decoding)

        return stream_text(self.tokenizer, prompts, stop, tokens)

    def generate(
        self,
        prompts: str | Sequence[str],
        sampling: Sampling | None = None,
        max_new_tokens: int | None = None,
        stop: Sequence[str] = (),
        decoding: Decoding | None = None,
    ) -> list[Completion]:
        """As `stream`, put together: one Completion a prompt."""
        count = 1 if isinstance(prompts, str) else len(prompts)
        return completions(self.stream(prompts, sampling, max_new_tokens, stop, decoding), count)

    def generate_tokens(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling | None = None,
        max_new_tokens: int | None = None,
        until: Until | None = None,
        decoding: Decoding | None = None,
    ) -> Iterator[NewToken]:
        """Yield the new tokens of every prompt as they are drawn, a token of each row in turn.

        A row ends with EOS, when `until(row, token)` says so ("stop"), after `max_new_tokens` ("length"), or
        when the context is full ("context"). Raises ValueError at once for prompts that do not fit.
        """
        decoding = decoding or Decoding()
        context = self.engine.config.max_position_embeddings
        rows = []
        for row, (prompt, limit) in enumerate(
            zip(prompts, limits(prompts, max_new_tokens, self.engine.config, decoding), strict=True)
        ):
            room = min(context, len(prompt) + limit.tokens - 1)  # the last token drawn is never fed
            held = HeldTokens(self.engine, room)
            rows.append(self.generation(held, prompt, limit, sampling, decoding, until, row))
        return self._drawn(rows)

    def generation(
        self,
        held: HeldTokens,
        prompt: Sequence[int],
        limit: Limit,
        sampling: Sampling | None = None,
        decoding: Decoding | None = None,
        until: Until | None = None,
        row: int = 0,
        around: Callable[[Draw], Draw] | None = None,
    ) -> Generation:
        """A sequence to be advanced by hand: see `mobilellm.runtime.generation.advance`.

        `around` is given what draws a token from logits (V,) and returns what is called in its place: it may
        change the logits, to -inf for what must not be drawn, and sees what is drawn.
        """
        context = self.engine.config.max_position_embeddings
        sampler: Draw = Sampler(sampling or Sampling(), prompt, row)
        sampler = sampler if around is None else around(sampler)
        vocabulary = self.tokenizer.vocab_size  # the embedding may have more rows, which mean nothing
        return Generation(
            held, prompt, vocabulary, context, sampler, limit, decoding or Decoding(), until, row
        )

    def session(self) -> Session:
        """A new, empty session."""
        return Session(self)

    def _drawn(self, rows: Sequence[Generation]) -> Iterator[NewToken]:
        while not all(row.finish for row in rows):
            for _, new in advance(self.engine, rows):
                yield new


class Session:
    """One text that grows, as in a chat: of a new prompt only what differs from the last text is computed.

    Prompts are whole ones, from the beginning; what comes out is what `RuntimeModel` makes of them. The
    methods may be called from any thread; a new generation ends the one before it.
    """

    def __init__(self, model: RuntimeModel) -> None:
        self._model = model
        self._held = HeldTokens(model.engine)
        self._current: Generation | None = None
        self._lock = threading.Lock()

    @property
    def tokens(self) -> list[int]:
        """What is held: prompt and answer up to the token before the last."""
        return list(self._held.tokens)

    @property
    def usage(self) -> Usage | None:
        """What the last generation cost so far; None before the first."""
        return self._current.usage if self._current else None

    def stream(
        self,
        prompt: str,
        sampling: Sampling | None = None,
        max_new_tokens: int | None = None,
        stop: Sequence[str] = (),
        decoding: Decoding | None = None,
    ) -> Iterator[Piece]:
        """As `RuntimeModel.stream` for one prompt."""

        def tokens(encoded: list[list[int]], until: Until) -> Iterator[NewToken]:
            return self.generate_tokens(encoded[0], sampling, max_new_tokens, until, decoding)

        return stream_text(self._model.tokenizer, prompt, stop, tokens)

    def generate(
        self,
        prompt: str,
        sampling: Sampling | None = None,
        max_new_tokens: int | None = None,
        stop: Sequence[str] = (),
        decoding: Decoding | None = None,
    ) -> Completion:
        """As `stream`, put together. Where another thread cancels, what there was by then."""
        return completions(self.stream(prompt, sampling, max_new_tokens, stop, decoding), 1)[0]

    def generate_tokens(
        self,
        prompt: Sequence[int],
        sampling: Sampling | None = None,
        max_new_tokens: int | None = None,
        until: Until | None = None,
        decoding: Decoding | None = None,
    ) -> Iterator[NewToken]:
        """As `RuntimeModel.generate_tokens` for one prompt."""
        decoding = decoding or Decoding()
        (limit,) = limits([prompt], max_new_tokens, self._model.engine.config, decoding)
        self.cancel()
        with self._lock:
            self._current = self._model.generation(self._held, prompt, limit, sampling, decoding, until)
        return self._drawn(self._current)

    def cancel(self) -> None:
        """From any thread: what is being generated ends now, with what there is; its `finish` is "cancelled".

        A prompt that is being read is left after the current block, in numpy after the current piece of it.
        The session can be used on.
        """
        if self._current is not None and not self._current.finish:
            self._current.cancel()
            if self._lock.locked():
                interrupt(self._model.engine)

    def save(self, path: str | Path) -> None:
        """Keep what is held in a file, for `restore` in this process or another."""
        model = self._fingerprint()
        with self._lock:
            self._held.cut(len(self._held.tokens))  # a Ctrl-C may have come between the two
            write_session(path, model, self._held.tokens, self._held.cache.state())

    def restore(self, path: str | Path) -> None:
        """Hold what `save` kept, and nothing else. Raises FileNotFoundError, or ValueError with one line."""
        tokens, state = read_session(path, self._fingerprint(), self._held.cache.kind)
        self.cancel()
        with self._lock:
            self._held.restore(tokens, state)

    def _fingerprint(self) -> str:
        if self._model.file is None:
            raise ValueError(f"{self._model.source}: sessions are kept for .gguf files alone")
        return self._model.file.sha256

    def _drawn(self, generation: Generation) -> Iterator[NewToken]:
        while not generation.finish:
            with self._lock:
                drawn = advance(self._model.engine, [generation])
            for _, new in drawn:
                yield new


def _warn(message: str) -> None:
    import logging

    logging.getLogger(__name__).warning(message)


def load(
    path: str | Path,
    threads: int | None = None,
    engine: Literal["auto", "native", "reference"] = "auto",
    say: Callable[[str], None] = _warn,
    kv_cache: KVCacheType = "f16",
) -> RuntimeModel:
    """Open a .gguf file. Raises FileNotFoundError, or ValueError with one line naming file and fault.

    `engine`: the compiled one, the readable one, or "auto": the compiled one where it could be compiled, else
    the readable one and a line to `say`. `threads` of the compiled one: by default what measures best.
    `kv_cache`: the type in which keys and values are kept; kv_cache.py says what q8_0 is.
    """
    if engine not in ("auto", "native", "reference"):
        raise ValueError(f"engine = {engine!r} is not known; choose auto, native or reference")
    file = read_gguf(path)
    tokenizer = gguf_tokenizer.read_tokenizer(file)
    if engine == "auto" and (fault := native.missing()) is not None:
        say(f"the native engine was not compiled ({fault}); the model runs in numpy, many times slower")
        engine = "reference"
    if engine == "reference":
        from mobilellm.runtime.reference import ReferenceModel

        runs: Engine = ReferenceModel(file, kv_cache)
    else:
        runs = native.NativeModel(file, threads, kv_cache=kv_cache)
    return RuntimeModel(runs, tokenizer, str(path), gguf_tokenizer.read_chat_template(file), file)
