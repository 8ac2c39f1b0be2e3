"""Artefacts of `mobilellm export` in the runtimes that they are made for: ExecuTorch, onnxruntime."""

from __future__ import annotations

import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

from mobilellm.accounting import kv_cache_bytes_per_token, stored_parameters
from mobilellm.config import ModelConfig
from mobilellm.runtime.bench import EngineContestant


class ExecutorchContestant(EngineContestant):
    """A program with XNNPACK's kernels."""

    def __init__(self, source: str, threads: int, room: int) -> None:
        from mobilellm.artefacts.executorch_engine import ExecutorchModel
        from mobilellm.artefacts.opening import PROGRAM

        start = time.perf_counter()
        file = Path(source) / PROGRAM
        model = ExecutorchModel(file)
        super().__init__(model, room, time.perf_counter() - start)
        from executorch.extension.pybindings import portable_lib

        portable_lib._unsafe_reset_threadpool(threads)  # its own interface has no other way
        self._about = {
            "version": version("executorch"),
            "backends": "XNNPACK",
            "n_threads": threads,
            **_of_file(model.config, file.stat().st_size, f"executorch {model.description['type']}"),
        }

    def about(self) -> dict[str, Any]:
        return self._about


class OnnxContestant(EngineContestant):
    """A graph for onnxruntime, on its CPU provider."""

    def __init__(self, source: str, threads: int, room: int) -> None:
        from mobilellm.artefacts.onnx_engine import OnnxModel

        start = time.perf_counter()
        model = OnnxModel(Path(source), threads)
        super().__init__(model, room, time.perf_counter() - start)
        size = sum(file.stat().st_size for file in model.file.parent.glob(f"{model.file.name}*"))
        self._about = {
            "version": version("onnxruntime"),
            "backends": "CPU",
            "n_threads": threads,
            **_of_file(model.config, size, f"onnx {model.types}"),
        }

    def about(self) -> dict[str, Any]:
        return self._about


def _of_file(config: ModelConfig, size: int, kind: str) -> dict[str, Any]:
    """Keys and values are float32 in both."""
    return {
        "type_k": "f32",
        "type_v": "f32",
        "model_type": kind,
        "model_size": size,
        "model_n_params": stored_parameters(config).total,
        "bytes_per_token": size,
        "cache_bytes_per_token": kv_cache_bytes_per_token(config, 32),
    }
