"""A directory for onnxruntime-genai, run by onnxruntime behind the interface of `runtime.session.Engine`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mobilellm.config import ModelConfig
from mobilellm.runtime.engine import CancelledError
from mobilellm.runtime.kv_cache import Room

Floats = NDArray[np.float32]
GENAI_CONFIG = "genai_config.json"


class OnnxModel:
    """Its final states are the logits already: the graph ends with the head."""

    def __init__(self, directory: Path, threads: int | None = None) -> None:
        """Raises FileNotFoundError, ImportError, or ValueError with one line naming file and fault."""
        import onnxruntime

        self.file = model_file(directory)
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        if threads is not None:
            options.intra_op_num_threads = threads
        try:
            self._session = onnxruntime.InferenceSession(
                str(self.file), options, providers=["CPUExecutionProvider"]
            )
        except Exception as error:  # onnxruntime raises classes of its own, without a common base
            raise ValueError(f"{self.file}: onnxruntime cannot load it: {_first_line(error)}") from None
        self._run: Any = None
        described = self._session.get_modelmeta().custom_metadata_map
        if "mobilellm.config" not in described:
            raise ValueError(f"{self.file}: was not written by mobilellm export; only such files are run")
        self.config = ModelConfig.from_json(described["mobilellm.config"], str(self.file))
        stated = (described.get(f"mobilellm.{name}", "") for name in ("type", "embedding_type"))
        self.backend, self.types = "onnxruntime", "+".join(dict.fromkeys(stated))
        self.slots = [
            value.name for value in self._session.get_inputs() if value.name.startswith("past_key_values.")
        ]

    def new_cache(self, capacity: int | None = None) -> OnnxCache:
        """An empty cache for `capacity` tokens, by default the model's context."""
        return OnnxCache(self, self.config.max_position_embeddings if capacity is None else capacity)

    def forward(self, tokens: NDArray[np.integer], cache: OnnxCache) -> Floats:
        """Feed tokens (T,) and return the logits after each (T, V); the cache grows by T."""
        import onnxruntime

        cache.reserve(tokens, self.config.vocab_size)
        binding = self._session.io_binding()
        fed = np.asarray(tokens, np.int64)[None]
        binding.bind_cpu_input("input_ids", fed)
        binding.bind_cpu_input("attention_mask", np.ones((1, cache.length + len(tokens)), np.int64))
        for name, values in cache.slots.items():
            binding.bind_ortvalue_input(name, values)
            binding.bind_ortvalue_output(name.replace("past_key_values", "present"), values)
        binding.bind_output("logits")
        self._run = onnxruntime.RunOptions()
        try:
            self._session.run_with_iobinding(binding, self._run)
        except Exception:  # a class of onnxruntime's own
            if self._run.terminate:
                raise CancelledError from None
            raise
        cache.length += len(tokens)
        logits: Floats = binding.get_outputs()[-1].numpy()[0]
        return logits

    def forward_batch(self, feeds: Sequence[tuple[NDArray[np.integer], OnnxCache]]) -> Floats:
        """Feed tokens (T_i,) each to its own cache; logits (sum of T_i, V)."""
        return np.concatenate([self.forward(tokens, cache) for tokens, cache in feeds])

    def logits(self, states: Floats) -> Floats:
        """The states (T, V) themselves."""
        return states

    def cancel(self) -> None:
        """From any thread: the `forward` that runs raises CancelledError after its current node."""
        if self._run is not None:
            self._run.terminate = True


class OnnxCache(Room):
    """Keys and values of one sequence, which the graph reads and writes in place."""

    def __init__(self, model: OnnxModel, capacity: int) -> None:
        import onnxruntime

        super().__init__(model.config, capacity)
        shape = (1, model.config.num_kv_heads, capacity, model.config.head_dim)
        self.slots: dict[str, Any] = {
            name: onnxruntime.OrtValue.ortvalue_from_numpy(np.zeros(shape, np.float32))
            for name in model.slots
        }


def model_file(directory: Path) -> Path:
    """The .onnx file that genai_config.json names."""
    described = directory / GENAI_CONFIG
    if not described.is_file():
        raise FileNotFoundError(f"{directory}: holds no {GENAI_CONFIG}; name a directory that export wrote")
    try:
        name = json.loads(described.read_text(encoding="utf-8"))["model"]["decoder"]["filename"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"{described}: does not say which file holds the model ({error!r})") from None
    file = directory / str(name)
    if not file.is_file():
        raise FileNotFoundError(f"{file}: {GENAI_CONFIG} names it, and it is not there")
    return file


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__
