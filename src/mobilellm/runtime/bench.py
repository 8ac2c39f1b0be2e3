"""How fast a .gguf file runs here: the measuring of the native engine, which `mobilellm bench` puts in turns.

A measurement starts from a cache of known length and feeds tokens that are decided beforehand: nothing is
sampled and nothing is read from the clock but the engine's own work, logits of the last token included.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mobilellm import __version__
from mobilellm.accounting import stored_parameters
from mobilellm.gguf import read_gguf
from mobilellm.gguf_model import read_config
from mobilellm.runtime import engine
from mobilellm.runtime.kv_cache import KVCacheType, bytes_per_token

_MEMORY_WORDS = 2**25
"""Of 64 bits, 268 MB: far more than a cache of processors holds."""
_MEMORY_PASSES = 5
_CHUNK = 512
"""Tokens at a time while a cache is filled up to a depth."""


class EngineContestant:
    """Anything behind the interface of `runtime.session.Engine`, with one sequence."""

    def __init__(self, model: Any, room: int, load_seconds: float) -> None:
        """`room`: most tokens that the sequence will hold."""
        self._model, self.load_seconds = model, load_seconds
        self._cache = model.new_cache(room)
        self._tokens = fed_tokens(room, model.config.vocab_size)

    def prefill(self, tokens: int) -> float:
        """Seconds to feed `tokens` to an empty cache."""
        self._cache.truncate(0)
        start = time.perf_counter()
        self._model.logits(self._model.forward(self._tokens[:tokens], self._cache)[-1:])
        return time.perf_counter() - start

    def decode(self, depth: int, tokens: int) -> float:
        """Seconds to feed `tokens` one by one after `depth` others."""
        self._cache.truncate(min(depth, self._cache.length))
        for place in range(self._cache.length, depth, _CHUNK):
            self._model.forward(self._tokens[place : min(place + _CHUNK, depth)], self._cache)
        start = time.perf_counter()
        for token in self._tokens[depth : depth + tokens, None]:
            self._model.logits(self._model.forward(token, self._cache))
        return time.perf_counter() - start


class RuntimeContestant(EngineContestant):
    """The native engine with one file. Raises what `engine.load` raises."""

    def __init__(self, source: str, threads: int, room: int, kv_cache: KVCacheType = "f16") -> None:
        start = time.perf_counter()
        model = engine.load(source, threads, kv_cache=kv_cache)
        super().__init__(model, room, time.perf_counter() - start)
        self._elsewhere = np.empty(0, np.uint64)

    def about(self) -> dict[str, Any]:
        return {
            "version": __version__,
            "backends": self._model.isa,
            "n_threads": self._model.threads,
            "type_k": self._model.kv_cache,
            "type_v": self._model.kv_cache,
        }

    def use_threads(self, threads: int) -> None:
        """On how many all that follows runs."""
        self._model.use_threads(threads)

    def read_memory(self) -> float:
        """Bytes a second that the engine's threads read of memory that no cache of the processor holds.

        The fastest of a few passes: the first ones wake threads and fill tables of pages.
        """
        if not self._elsewhere.size:
            self._elsewhere = np.ones(_MEMORY_WORDS, np.uint64)
        seconds = []
        for _ in range(_MEMORY_PASSES):
            start = time.perf_counter()
            self._model.read_memory(self._elsewhere)
            seconds.append(time.perf_counter() - start)
        return self._elsewhere.nbytes / min(seconds)


def describe(path: Path, kv_cache: KVCacheType = "f16") -> dict[str, Any]:
    """Of a .gguf file, under llama-bench's names, and the bytes that one token reads.

    Those are all weights once, however often a shared block runs, without an embedding that is not the head;
    and for every token in the cache its keys and values in the type `kv_cache`.
    """
    file = read_gguf(path)
    config = read_config(file)
    sizes = file.bytes_by_type
    not_read = 0 if config.tie_word_embeddings else file.tensors["token_embd.weight"].nbytes
    return {
        "model_type": f"{file.metadata['general.architecture']} {next(iter(sizes))}",
        "model_size": sum(sizes.values()),
        "model_n_params": stored_parameters(config).total,
        "bytes_per_token": sum(sizes.values()) - not_read,
        "cache_bytes_per_token": bytes_per_token(kv_cache, config),
        "context": config.max_position_embeddings,
    }


def fed_tokens(count: int, vocabulary: int) -> NDArray[np.int64]:
    """What every contestant is fed: ids that any vocabulary has, never the same twice in a row."""
    return np.arange(count) % (vocabulary // 2) + vocabulary // 4
