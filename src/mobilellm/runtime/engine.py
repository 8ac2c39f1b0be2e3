"""The native engine: what reference.py computes, by the compiled kernels of native/.

The interface is that of ReferenceModel. Calls from several threads run one after the other; the GIL is
released while they do. Sums are taken in one order for every number of threads and every chunking, so that
the numbers are the same bit for bit; between instruction sets they differ by rounding.
"""

from __future__ import annotations

import ctypes
import os
import threading
import time
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mobilellm import gguf_model
from mobilellm.gguf import GGUF, read_gguf
from mobilellm.gguf_blocks import TYPES
from mobilellm.runtime import native_library, native_weights
from mobilellm.runtime.kv_cache import CacheState, Floats, KVCache, KVCacheType, check_cache_type
from mobilellm.runtime.native_library import CANCELLED, DONE, NO_MEMORY, Library
from mobilellm.runtime.thread_choice import thread_choices

ISA_VARIABLE = "MOBILELLM_ISA"
INSTRUCTION_SETS = ("scalar", "avx2", "avxvnni", "avx512vl", "avx512", "neon", "dotprod")


class CancelledError(Exception):
    """Another thread called `cancel` while this call ran."""


class NativeModel:
    """One model in the engine's memory. Raises ValueError where it cannot be run; see `missing`."""

    def __init__(
        self,
        file: GGUF,
        threads: int | None = None,
        isa: str | None = None,
        kv_cache: KVCacheType = "f16",
    ) -> None:
        """`threads`: by default what thread_choice.py finds best. `isa`: one of `instruction_sets()`, by
        default what MOBILELLM_ISA names, else the best. `kv_cache`: the type of keys and values."""
        library = native_library.load()
        if isinstance(library, str):
            raise ValueError(f"the native engine was not compiled: {library}; use engine='reference'")
        self.config = gguf_model.read_config(file)
        self.kv_cache = check_cache_type(kv_cache, self.config)
        self._choices = thread_choices(threads)
        self._threads = threads or 1  # those that nobody asked for come later, or are done without
        isa = _checked_isa(isa)
        self.library, self._file, self._process = library, file, os.getpid()
        schedule = np.array(self.config.schedule, np.int32)
        norms = native_weights.norms(file, self.config)
        error = ctypes.create_string_buffer(256)
        self.handle = library.create(
            ctypes.byref(native_weights.shape(self.config)), _address(schedule),
            native_weights.matrices(file, self.config), _address(norms),
            TYPES[kv_cache.upper()].number, self._threads, isa.encode(), error, len(error),
        )  # fmt: skip
        if not self.handle:
            raise ValueError(f"{file.path}: {error.value.decode(errors='replace')}")
        self.isa = library.isa(self.handle).decode()
        self._running, self._open = threading.Lock(), threading.Lock()
        self._finalizer = weakref.finalize(self, _destroy, library, self.handle, self._process)
        self._finalizer.atexit = False  # a thread may still be in a call then, and the memory goes anyway
        self._take_threads(self.threads)
        native_weights.fill(library, self.handle, file, self.config)

    def new_cache(self, capacity: int | None = None) -> NativeCache:
        """An empty cache for `capacity` tokens, by default the model's context."""
        self._check_usable()
        context = self.config.max_position_embeddings
        return NativeCache(self, context if capacity is None else capacity)

    def forward(self, tokens: NDArray[np.integer], cache: NativeCache) -> Floats:
        """Feed tokens (T,) and return their final normalised states (T, E); the cache grows by T."""
        return self.forward_batch([(tokens, cache)])

    def forward_batch(self, feeds: Sequence[tuple[NDArray[np.integer], NativeCache]]) -> Floats:
        """Feed several sequences at once: tokens (T_i,), each to its own cache. States (sum of T_i, E).

        Each sequence's states are those it would get alone. Raises ValueError for what `reserve` refuses,
        before anything is written, and CancelledError; no cache has grown then.
        """
        self._check_usable()
        if not feeds:
            raise ValueError("forward_batch: no sequence given")
        if len({id(cache) for _, cache in feeds}) < len(feeds):
            raise ValueError("forward_batch: a cache is there twice; give its tokens in one feed")
        for tokens, cache in feeds:
            cache.reserve(tokens, self.config.vocab_size)
            if cache.owner is not self:
                raise ValueError(
                    "forward_batch: a cache was made by another model; use this model's new_cache"
                )
        counts = [len(tokens) for tokens, _ in feeds]
        tokens = np.concatenate([tokens for tokens, _ in feeds]).astype(np.int32)
        positions = np.concatenate(
            [
                np.arange(cache.length, cache.length + count)
                for (_, cache), count in zip(feeds, counts, strict=True)
            ]
        ).astype(np.int32)
        sequences = np.repeat(np.array([cache.handle for _, cache in feeds], np.uintp), counts)
        states = np.empty((len(tokens), self.config.hidden_size), np.float32)
        self._call(
            "forward", len(tokens), _address(tokens), _address(sequences), _address(positions),
            _address(states),
        )  # fmt: skip
        for (_, cache), count in zip(feeds, counts, strict=True):
            cache.length += count
        return states

    def logits(self, states: Floats) -> Floats:
        """Logits (T, V) of final states (T, E)."""
        self._check_usable()
        if states.ndim != 2 or states.shape[1] != self.config.hidden_size:
            raise ValueError(f"states have shape {states.shape}; expected (T, {self.config.hidden_size})")
        states = np.ascontiguousarray(states, np.float32)
        logits = np.empty((len(states), self.config.vocab_size), np.float32)
        self._call("logits", len(states), _address(states), _address(logits))
        return logits

    def cancel(self) -> None:
        """From any thread: the call that runs raises CancelledError after its current block. Else nothing."""
        with self._open:
            if self.handle:
                self.library.cancel(self.handle)

    def close(self) -> None:
        """Give the memory back now; a call that runs is waited for."""
        with self._running, self._open:
            self.handle = None
            self._finalizer()

    @property
    def threads(self) -> int:
        """On how many the next token of a single sequence is computed."""
        return self._choices.threads(1)

    def use_threads(self, threads: int) -> None:
        """Compute on so many from now on, with the same numbers. Raises ValueError where they cannot be."""
        self._check_usable()
        choices = thread_choices(threads)
        with self._running:
            self._take_threads(threads)
            if self._threads != threads:
                raise ValueError(f"threads = {threads} could not be started; take fewer")
            self._choices = choices

    @property
    def arena_bytes(self) -> int:
        """What a token reads beside its cache: all matrices, the embedding only where it is tied."""
        self._check_usable()
        return int(self.library.arena_bytes(self.handle))

    def read_memory(self, data: NDArray[Any]) -> int:
        """Sum of 64-bit words of an array, read by the engine's threads: how fast memory can be read here."""
        self._check_usable()
        with self._running:
            return int(self.library.read(self.handle, _address(data), data.nbytes))

    def _call(self, kind: str, tokens: int, *arguments: Any) -> None:
        """A pass of so many tokens, or the logits after it. Raises what it ended with before its end."""
        with self._running:
            self._check_usable()
            if kind == "forward":
                self._take_threads(self._choices.begin(tokens))
            start = time.perf_counter()
            result = getattr(self.library, kind)(self.handle, tokens, *arguments)
            if result == DONE:
                self._choices.spend(time.perf_counter() - start)
            else:
                self._choices.drop()
        if result == CANCELLED:
            raise CancelledError
        if result == NO_MEMORY:
            raise MemoryError("the native engine found no memory for this batch; feed fewer tokens at once")
        if result != DONE:
            raise AssertionError(f"the native engine refused what had been checked ({result})")

    def _take_threads(self, threads: int) -> None:
        """Those that cannot be started are done without."""
        if threads != self._threads and self.library.use_threads(self.handle, threads) == DONE:
            self._threads = threads

    def _check_usable(self) -> None:
        if not self.handle:
            raise ValueError(f"{self._file.path}: the model was closed; load it again")
        if os.getpid() != self._process:
            raise ValueError(
                f"{self._file.path}: was loaded before this process was forked, and its threads are gone; "
                "load it in this process"
            )


class NativeCache(KVCache):
    """Keys and values of one sequence, in the engine's memory."""

    def __init__(self, owner: NativeModel, capacity: int) -> None:
        super().__init__(owner.config, capacity, owner.kv_cache)
        self.owner = owner
        library = owner.library
        self.handle = library.sequence_create(owner.handle, capacity)
        if not self.handle:
            raise MemoryError(f"there is no memory for a cache of {capacity} tokens; ask for fewer")
        weakref.finalize(self, library.sequence_destroy, self.handle).atexit = False

    def state(self) -> CacheState:
        """A copy of what is in here, to be kept or to go on from in another cache."""
        state = self.empty_state(self.length)
        self.owner.library.sequence_read(self.handle, self.length, *map(_address, state))
        return state

    def restore(self, state: CacheState) -> None:
        """Hold what `state` holds and nothing else. Raises ValueError for one that does not fit."""
        tokens = self.check_state(state)
        whole = [np.ascontiguousarray(each) for each in state]
        self.owner.library.sequence_write(self.handle, tokens, *map(_address, whole))
        self.length = tokens


def load(
    path: str | Path, threads: int | None = None, isa: str | None = None, kv_cache: KVCacheType = "f16"
) -> NativeModel:
    """Raises FileNotFoundError, or ValueError with one line naming file and fault."""
    return NativeModel(read_gguf(path), threads, isa, kv_cache)


def missing() -> str | None:
    """Why the engine cannot be used here, or None. Compiles it where that has not been done."""
    library = native_library.load()
    return library if isinstance(library, str) else None


def instruction_sets() -> tuple[str, ...]:
    """Those of `INSTRUCTION_SETS` that this processor and this build have; none where it was not compiled."""
    library = native_library.load()
    if isinstance(library, str):
        return ()
    return tuple(isa for isa in INSTRUCTION_SETS if library.half(isa.encode(), 0.0) >= 0)


def _checked_isa(isa: str | None) -> str:
    isa = os.environ.get(ISA_VARIABLE, "") if isa is None else isa
    if isa and isa not in INSTRUCTION_SETS:
        raise ValueError(
            f"instruction set {isa!r} ({ISA_VARIABLE}) is not known; choose {' or '.join(INSTRUCTION_SETS)}"
        )
    return isa


def _address(array: NDArray[Any]) -> int:
    return array.ctypes.data


def _destroy(library: Library, handle: int, process: int) -> None:
    if os.getpid() == process:  # a forked process has the memory but not the threads that would have to end
        library.destroy(handle)
