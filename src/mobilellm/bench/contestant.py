"""Who can take part in a benchmark, and what each must be able to do."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, Protocol, get_args

from mobilellm.runtime.kv_cache import KVCacheType


class Contestant(Protocol):
    """One runtime with one model and one sequence, which is fed tokens that are decided beforehand.

    Made from (source, threads, room): a file or directory, threads to use, most tokens of the sequence.
    """

    load_seconds: float

    def about(self) -> dict[str, Any]:
        """version, backends, n_threads, type_k, type_v; and what `runtime.bench.describe` tells of a file."""
        ...

    def prefill(self, tokens: int) -> float:
        """Seconds to feed `tokens` at once to an empty sequence, with the logits after the last."""
        ...

    def decode(self, depth: int, tokens: int) -> float:
        """Seconds to feed `tokens` one by one after `depth` others, with the logits after each."""
        ...


@dataclass(frozen=True)
class Kind:
    """A runtime that can take part."""

    label: str
    reads: str
    """The source it is made from: "gguf", "unrolled" (a .gguf file without sharing), or "directory"."""
    packages: tuple[str, ...] = ()
    """What must be installed."""
    extra: str = ""
    """The extra that installs it."""


KINDS = {
    "runtime": Kind("mobilellm", "gguf"),
    "runtime q8_0": Kind("mobilellm, cache q8_0", "gguf"),
    "torch": Kind("mobilellm torch", "directory", ("torch",), "torch"),
    "llama.cpp": Kind("llama.cpp", "unrolled", ("llama_cpp",), "peers"),
    "transformers": Kind("transformers", "directory", ("torch", "transformers"), "hf"),
    "executorch": Kind("executorch", "directory", ("executorch",), "executorch"),
    "onnx": Kind("onnxruntime", "directory", ("onnxruntime",), "onnx"),
}
RUNTIME: dict[KVCacheType, str] = {"f16": "runtime", "q8_0": "runtime q8_0"}
"""This package's engine, by the type of its cache."""
Peer = Literal["llama.cpp", "transformers"]
PEERS: tuple[Peer, ...] = get_args(Peer)
"""Who can be given the weights of a .gguf file."""


def kv_cache_of(kind: str) -> KVCacheType:
    """The type of the cache that this package's engine is measured with; f16 for all other runtimes."""
    return next((name for name, its_kind in RUNTIME.items() if its_kind == kind), "f16")


def maker(kind: str) -> Callable[[str, int, int], Contestant]:
    """What makes a contestant; only its own packages are imported."""
    if kind in RUNTIME.values():
        from mobilellm.runtime.bench import RuntimeContestant

        return partial(RuntimeContestant, kv_cache=kv_cache_of(kind))
    if kind == "torch":
        from mobilellm.bench.torch_contestant import TorchContestant

        return TorchContestant
    if kind == "llama.cpp":
        from mobilellm.bench.llama_cpp_contestant import LlamaCppContestant

        return LlamaCppContestant
    if kind in ("executorch", "onnx"):
        from mobilellm.bench.artefact_contestants import ExecutorchContestant, OnnxContestant

        return ExecutorchContestant if kind == "executorch" else OnnxContestant
    from mobilellm.bench.transformers_contestant import TransformersContestant

    return TransformersContestant
