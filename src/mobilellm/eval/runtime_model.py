"""A .gguf file as an evaluation sees it, run by the package's own runtime: no torch."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mobilellm.chat_template import ChatTemplate
from mobilellm.completion import Completion, NewToken, Until, continue_texts
from mobilellm.eval.interface import Likelihood, ModelIdentity, Request
from mobilellm.eval.request_rows import check
from mobilellm.gguf import read_gguf
from mobilellm.runtime.decoding import Decoding
from mobilellm.runtime.generation import PREFILL_CHUNK
from mobilellm.runtime.kv_cache import KVCacheType
from mobilellm.runtime.session import RuntimeModel, load
from mobilellm.tokenizer import BOS_ID

_ROWS_AT_ONCE = 256
"""Logits held at a time: 32 MB at a vocabulary of 32,000."""
_PROMPTS_AT_ONCE = 8
"""Advanced together, so that weights are read once for all; each gets what it would get alone."""


class GgufModel:
    """A `LanguageModel`; made by `gguf_language_model`."""

    def __init__(self, model: RuntimeModel, path: Path) -> None:
        self._model, self._path = model, path

    @cached_property
    def identity(self) -> ModelIdentity:
        """The fingerprint is the file's SHA-256; the dtype names the types in it, most bytes first."""
        described = read_gguf(self._path)
        sizes = described.bytes_by_type
        with self._path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        engine: Any = self._model.engine
        runs_in = getattr(engine, "isa", "reference")
        if (kv_cache := getattr(engine, "kv_cache", "f16")) != "f16":
            runs_in += f", cache in {kv_cache}"
        return ModelIdentity(
            name=str(self._path),
            backend=f"runtime ({runs_in})",
            dtype="+".join(sizes),
            device="cpu",
            fingerprint=digest,
            parameters=sum(int(np.prod(tensor.shape)) for tensor in described.tensors.values()),
            bytes=sum(sizes.values()),
            config=dataclasses.asdict(engine.config),
        )

    @property
    def context(self) -> int:
        return self._model.engine.config.max_position_embeddings

    @property
    def bos(self) -> int:
        return BOS_ID

    def encode(self, texts: Sequence[str], special: bool = True) -> list[list[int]]:
        """Ids of each text, with BOS in front unless `special` is false."""
        return self._model.tokenizer.encode_batch(texts, bos=special)

    def encode_with_places(self, text: str) -> tuple[list[int], list[int]]:
        return self._model.tokenizer.encode_with_starts(text)

    @property
    def chat_template(self) -> str | None:
        return self._model.chat_template

    def chat_format(self, template: str) -> ChatTemplate:
        return ChatTemplate(template, self._model.tokenizer)

    def log_likelihoods(self, requests: Sequence[Request]) -> Iterator[tuple[int, Likelihood]]:
        """(number of the request, its answer), in the order of their tokens.

        Neighbours in that order share most of what they begin with, and that stays in the cache. `greedy` is
        by the highest logit, of equal ones the lowest id. Raises ValueError at once for a request that is
        empty, too long, or holds ids outside the vocabulary.
        """
        check(requests, self.context, self._model.engine.config.vocab_size)
        return self._log_likelihoods(requests)

    def _log_likelihoods(self, requests: Sequence[Request]) -> Iterator[tuple[int, Likelihood]]:
        if not requests:
            return
        engine = self._model.engine
        longest = max(len(context) + len(continuation) - 1 for context, continuation in requests)
        cache, held = engine.new_cache(longest), np.empty(0, np.int64)
        in_order = sorted(range(len(requests)), key=lambda n: requests[n].context + requests[n].continuation)
        for index in in_order:
            context, continuation = requests[index]
            fed = np.array((context + continuation)[:-1])
            same = min(len(held), len(fed))
            differing = np.flatnonzero(held[:same] != fed[:same])
            # The state that predicts the first wanted token has to be computed, whatever is held.
            kept = min(int(differing[0]) if len(differing) else same, len(context) - 1)
            cache.truncate(kept)
            states = [
                engine.forward(fed[start : start + PREFILL_CHUNK], cache)
                for start in range(kept, len(fed), PREFILL_CHUNK)
            ]
            held = fed
            yield index, self._answer(np.concatenate(states)[-len(continuation) :], np.array(continuation))

    def _answer(self, states: NDArray[np.float32], wanted: NDArray[np.integer]) -> Likelihood:
        tokens, greedy = np.empty(len(wanted), np.float32), True
        for start in range(0, len(wanted), _ROWS_AT_ONCE):
            some = wanted[start : start + _ROWS_AT_ONCE]
            logits = self._model.engine.logits(states[start : start + _ROWS_AT_ONCE]).astype(np.float64)
            highest = logits.max(axis=1, keepdims=True)
            total = np.log(np.exp(logits - highest).sum(axis=1)) + highest[:, 0]
            tokens[start : start + _ROWS_AT_ONCE] = logits[np.arange(len(some)), some] - total
            greedy &= bool((logits.argmax(axis=1) == some).all())
        return Likelihood(tokens, greedy)

    def greedy(
        self, prompts: Sequence[Sequence[int]], stop: Sequence[str], max_tokens: int
    ) -> list[Completion]:
        """What follows each prompt, up to a stop string, EOS, `max_tokens` or a full context."""

        def tokens(prompts: Sequence[Sequence[int]], until: Until) -> Iterator[NewToken]:
            return self._model.generate_tokens(
                prompts, max_new_tokens=max_tokens, until=until, decoding=Decoding(context="stop")
            )

        return [
            completion
            for start in range(0, len(prompts), _PROMPTS_AT_ONCE)
            for completion in continue_texts(
                self._model.tokenizer, prompts[start : start + _PROMPTS_AT_ONCE], stop, tokens
            )
        ]


def gguf_language_model(
    path: str | Path, say: Callable[[str], None], kv_cache: KVCacheType = "f16"
) -> GgufModel:
    """Raises what `mobilellm.runtime.load` raises."""
    return GgufModel(load(path, say=say, kv_cache=kv_cache), Path(path))
