"""Anything this package runs, as one model that reads and writes text: a file, an export, a checkpoint."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from mobilellm.artefacts.opening import artefact_directory, open_artefact
from mobilellm.runtime.kv_cache import KVCacheType
from mobilellm.runtime.session import RuntimeModel, load


def open_text_model(
    source: str, threads: int | None, say: Callable[[str], None], kv_cache: KVCacheType = "f16"
) -> RuntimeModel:
    """Open a .gguf file, a directory for ONNX Runtime or ExecuTorch, or what `mobilellm.load` takes.

    `threads` and `kv_cache` are for .gguf files. Raises FileNotFoundError, ImportError, or ValueError with
    one line.
    """
    if source.endswith(".gguf"):
        return load(source, threads, say=say, kv_cache=kv_cache)
    if threads is not None:
        raise ValueError(f"threads = {threads} is for .gguf files; for others set OMP_NUM_THREADS")
    if kv_cache != "f16":
        raise ValueError(f"kv_cache = {kv_cache} is for .gguf files; leave it out")
    if (directory := artefact_directory(Path(source))) is not None:
        return open_artefact(directory)
    from mobilellm.artefacts.torch_engine import open_checkpoint

    return open_checkpoint(source, say)
