"""The native engine: what reference.py computes, by the compiled kernels of native/.

The interface is that of ReferenceModel. Calls from several threads run one after the other; the GIL is
released while they do. Sums are taken in one order for every number of threads and every chunking, so that
the numbers are the same bit for bit; between instruction sets they differ by rounding.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mobilellm import gguf_model
from mobilellm.config import ModelConfig
from mobilellm.gguf import GGUF, read_gguf
from mobilellm.runtime import native_library
from mobilellm.runtime.native_library import Library, Shape, Tensor

Floats = NDArray[np.float32]

ISA_VARIABLE = "MOBILELLM_ISA"
INSTRUCTION_SETS = ("scalar", "avx2")
MOST_THREADS = 256
_DEFAULT_THREADS = 4
_MATRICES = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")
_NORMS = ("attn_norm", "ffn_norm")


class Cancelled(Exception):  # noqa: N818: what was asked for, and no error
    """Another thread called `cancel` while this call ran."""


class NativeModel:
    """One model in the engine's memory. Raises ValueError where it cannot be run; see `available`."""

    def __init__(self, file: GGUF, threads: int | None = None, isa: str | None = None) -> None:
        """`threads`: by default one a core, four at most. `isa`: by default the best; a name for tests."""
        library = native_library.load()
        if isinstance(library, str):
            raise ValueError(f"the native engine was not compiled: {library}; use engine='reference'")
        self.config = gguf_model.read_config(file)
        self.threads = _checked_threads(threads)
        isa = _checked_isa(isa)
        self._library, self._file, self._process = library, file, os.getpid()
        tensors = [_tensor(file, name) for name in _tensor_names(self.config)]
        norms = np.concatenate([file.array(name) for name in _norm_names(self.config)])
        error = ctypes.create_string_buffer(256)
        shape, schedule = _shape(self.config), np.array(self.config.schedule, np.int32)
        self._handle = library.create(
            ctypes.byref(shape), _address(schedule), (Tensor * len(tensors))(*tensors), _address(norms),
            self.threads, isa.encode(), error, len(error),
        )  # fmt: skip
        if not self._handle:
            raise ValueError(f"{file.path}: {error.value.decode(errors='replace')}")
        self.isa = library.isa(self._handle).decode()
        self._finalizer = weakref.finalize(self, _destroy, library, self._handle, self._process)
        self._fill()

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

        Each sequence's states are those it would get alone. Raises ValueError for what `Cache.reserve` refuses,
        before anything is written, and Cancelled; no cache has grown then.
        """
        self._check_usable()
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
            self._library.forward, len(tokens), _address(tokens), _address(sequences), _address(positions),
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
        self._call(self._library.logits, len(states), _address(states), _address(logits))
        return logits

    def cancel(self) -> None:
        """From any thread: the call that runs raises Cancelled after its current block. Else nothing."""
        if self._handle:
            self._library.cancel(self._handle)

    def close(self) -> None:
        """Give the memory back now. Not while a call runs."""
        self._finalizer()
        self._handle = None

    @property
    def arena_bytes(self) -> int:
        """What a token reads at least, the cache left out: all matrices, the embedding only where it is tied."""
        self._check_usable()
        return int(self._library.arena_bytes(self._handle))

    def read_memory(self, data: NDArray[Any]) -> int:
        """Sum of 64-bit words of an array, read by the engine's threads: how fast memory can be read here."""
        self._check_usable()
        return int(self._library.read(self._handle, _address(data), data.nbytes))

    def _fill(self) -> None:
        """Bring all into the arena, and let go of what the file's pages took meanwhile."""
        for block in range(self.config.num_layers):
            self._library.fill(self._handle, block)
            _forget(self._file, [f"blk.{block}.{name}.weight" for name in _MATRICES])
        self._library.fill(self._handle, self.config.num_layers)
        _forget(self._file, [_head_name(self.config)])

    def _call(self, function: Any, *arguments: Any) -> None:
        result = function(self._handle, *arguments)
        if result == native_library.CANCELLED:
            raise Cancelled
        if result == native_library.NO_MEMORY:
            raise MemoryError("the native engine found no memory for this batch; feed fewer tokens at once")
        if result != native_library.DONE:
            raise AssertionError(f"the native engine refused what had been checked ({result})")

    def _check_usable(self) -> None:
        if not self._handle:
            raise ValueError(f"{self._file.path}: the model was closed; load it again")
        if os.getpid() != self._process:
            raise ValueError(
                f"{self._file.path}: was loaded before this process was forked, and its threads stayed behind; "
                "load it in this process"
            )


class NativeCache:
    """Keys and values of one sequence, in the engine's memory."""

    def __init__(self, owner: NativeModel, capacity: int) -> None:
        context = owner.config.max_position_embeddings
        if not 1 <= capacity <= context:
            raise ValueError(f"a cache of {capacity} tokens must lie in 1 … {context}, the context")
        library = owner._library
        self.owner, self.capacity, self.length = owner, capacity, 0
        self.handle = library.sequence_create(owner._handle, capacity)
        if not self.handle:
            raise MemoryError(f"there is no memory for a cache of {capacity} tokens; ask for fewer")
        weakref.finalize(self, _destroy_sequence, library, self.handle)

    def reserve(self, tokens: NDArray[np.integer], vocab_size: int) -> None:
        """Refuse what is no token and what does not fit, before anything is written. Raises ValueError."""
        if tokens.ndim != 1 or len(tokens) == 0:
            raise ValueError(f"tokens have shape {tokens.shape}; expected a sequence that is not empty")
        if not 0 <= tokens.min() <= tokens.max() < vocab_size:
            raise ValueError(
                f"token ids {tokens.min()} … {tokens.max()} are not in the vocabulary of {vocab_size}"
            )
        if self.length + len(tokens) > self.capacity:
            raise ValueError(
                f"the cache holds {self.length} of {self.capacity} tokens and cannot take {len(tokens)} more"
            )

    def truncate(self, length: int) -> None:
        """Forget everything after `length` tokens."""
        if not 0 <= length <= self.length:
            raise ValueError(f"cannot truncate a cache of {self.length} tokens to {length}")
        self.length = length


def load(path: str | Path, threads: int | None = None, isa: str | None = None) -> NativeModel:
    """Raises FileNotFoundError, or ValueError with one line naming file and fault."""
    return NativeModel(read_gguf(path), threads, isa)


def missing() -> str | None:
    """Why the engine cannot be used here, or None. Compiles it where that has not been done."""
    library = native_library.load()
    return library if isinstance(library, str) else None


def default_threads() -> int:
    """The cores this process may use, threads of one core counted once, and four at most.

    A token is bound by memory, which few cores use up, and by meetings, which cost more the more there are.
    """
    processors = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1)
    siblings = set()
    for processor in processors:
        topology = Path(f"/sys/devices/system/cpu/cpu{processor}/topology/thread_siblings_list")
        try:
            siblings.add(topology.read_text(encoding="ascii").strip())
        except OSError:
            siblings.add(str(processor))
    return max(1, min(_DEFAULT_THREADS, len(siblings)))


def _checked_threads(threads: int | None) -> int:
    if threads is None:
        return default_threads()
    if not 1 <= threads <= MOST_THREADS:
        raise ValueError(f"threads = {threads} must lie in 1 … {MOST_THREADS}")
    return threads


def _checked_isa(isa: str | None) -> str:
    isa = os.environ.get(ISA_VARIABLE, "") if isa is None else isa
    if isa and isa not in INSTRUCTION_SETS:
        raise ValueError(
            f"instruction set {isa!r} ({ISA_VARIABLE}) is not known; choose one of {', '.join(INSTRUCTION_SETS)}"
        )
    return isa


def _tensor_names(config: ModelConfig) -> list[str]:
    """As native/engine.h wants them."""
    blocks = [f"blk.{block}.{name}.weight" for block in range(config.num_layers) for name in _MATRICES]
    return ["token_embd.weight", *blocks, _head_name(config)]


def _norm_names(config: ModelConfig) -> list[str]:
    blocks = [f"blk.{block}.{name}.weight" for block in range(config.num_layers) for name in _NORMS]
    return [*blocks, "output_norm.weight"]


def _head_name(config: ModelConfig) -> str:
    return "token_embd.weight" if config.tie_word_embeddings else "output.weight"


def _tensor(file: GGUF, name: str) -> Tensor:
    info = file.tensors[name]
    rows, columns = info.shape
    return Tensor(_address(file.raw(name)), info.type.number, rows, columns)


def _shape(config: ModelConfig) -> Shape:
    return Shape(
        config.vocab_size, config.hidden_size, config.intermediate_size, config.num_layers, config.num_heads,
        config.num_kv_heads, config.head_dim, config.num_steps, config.rms_norm_eps, config.rope_theta,
    )  # fmt: skip


def _forget(file: GGUF, names: Sequence[str]) -> None:
    """Let the system drop the mapped pages of tensors from this process's memory; they can be read again."""
    mapped = file.data.base
    if not isinstance(mapped, mmap.mmap) or not hasattr(mmap, "MADV_DONTNEED"):
        return
    for name in names:
        info = file.tensors[name]
        start = -(-info.offset // mmap.PAGESIZE) * mmap.PAGESIZE
        length = (info.offset + info.nbytes) // mmap.PAGESIZE * mmap.PAGESIZE - start
        if length > 0:
            mapped.madvise(mmap.MADV_DONTNEED, start, length)


def _address(array: NDArray[Any]) -> int:
    return array.ctypes.data


def _destroy(library: Library, handle: int, process: int) -> None:
    if os.getpid() == process:  # a forked process has the memory but not the threads that would have to end
        library.destroy(handle)


def _destroy_sequence(library: Library, handle: int) -> None:
    library.sequence_destroy(handle)
