"""llama.cpp, through the C functions that llama-cpp-python binds: what llama-bench measures."""

from __future__ import annotations

import ctypes
import time
from typing import Any

import llama_cpp

from mobilellm.runtime.bench import fed_tokens

_TOKENS = ctypes.POINTER(llama_cpp.llama_token)


class LlamaCppContestant:
    """One file and one context, set as llama-bench sets them. Raises ValueError where it refuses the file."""

    def __init__(self, source: str, threads: int, room: int) -> None:
        _be_quiet()
        start = time.perf_counter()
        self._model = llama_cpp.llama_model_load_from_file(
            source.encode(), llama_cpp.llama_model_default_params()
        )
        if not self._model:
            raise ValueError(f"llama.cpp refuses {source}")
        options = llama_cpp.llama_context_default_params()
        options.n_ctx = room
        options.n_threads = options.n_threads_batch = self._threads = threads
        self._context = llama_cpp.llama_init_from_model(self._model, options)
        if not self._context:
            raise ValueError(f"llama.cpp made no context of {room} tokens for {source}")
        self.load_seconds = time.perf_counter() - start
        self._memory = llama_cpp.llama_get_memory(self._context)
        self._at_once = llama_cpp.llama_n_batch(self._context)
        self._held = 0
        vocabulary = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self._model))
        self._tokens = (llama_cpp.llama_token * room)(*fed_tokens(room, vocabulary).tolist())

    def about(self) -> dict[str, Any]:
        return {
            "version": llama_cpp.__version__,
            "backends": "CPU",
            "n_threads": self._threads,
            "type_k": "f16",
            "type_v": "f16",
        }

    def prefill(self, tokens: int) -> float:
        self._truncate(0)
        start = time.perf_counter()
        self._feed(tokens)
        return time.perf_counter() - start

    def decode(self, depth: int, tokens: int) -> float:
        self._truncate(min(depth, self._held))
        self._feed(depth - self._held)
        start = time.perf_counter()
        for _ in range(tokens):
            self._feed(1)
        return time.perf_counter() - start

    def _feed(self, count: int) -> None:
        """The next tokens, as many at once as a batch takes; returns when the logits are there."""
        while count > 0:
            some = min(count, self._at_once)
            place = ctypes.byref(self._tokens, self._held * ctypes.sizeof(llama_cpp.llama_token))
            batch = llama_cpp.llama_batch_get_one(ctypes.cast(place, _TOKENS), some)
            if code := llama_cpp.llama_decode(self._context, batch):
                raise RuntimeError(f"llama_decode of {some} tokens failed ({code})")
            self._held, count = self._held + some, count - some
        llama_cpp.llama_synchronize(self._context)

    def _truncate(self, length: int) -> None:
        llama_cpp.llama_memory_seq_rm(self._memory, -1, length, -1)
        self._held = length


@llama_cpp.llama_log_callback  # type: ignore[untyped-decorator]
def _ignore(level: int, text: bytes, data: ctypes.c_void_p) -> None:
    pass


def _be_quiet() -> None:
    llama_cpp.llama_log_set(_ignore, ctypes.c_void_p(0))
