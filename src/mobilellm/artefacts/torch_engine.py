"""A checkpoint, run by PyTorch behind the interface of `runtime.generation.Engine`."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mobilellm.model.api import load
from mobilellm.model.cache import KVCache
from mobilellm.model.fused import FusedWeights, fuse
from mobilellm.model.transformer import MobileLLM
from mobilellm.runtime.kv_cache import Room
from mobilellm.runtime.session import RuntimeModel

Floats = NDArray[np.float32]


class TorchModel:
    """Several sequences may be in flight; they are computed one after the other."""

    def __init__(self, model: MobileLLM) -> None:
        self._model = model
        self.config = model.config
        self.backend, self.types = "torch", str(model.head_weight.dtype).removeprefix("torch.")

    def new_cache(self, capacity: int | None = None) -> TorchCache:
        """An empty cache for `capacity` tokens, by default the model's context."""
        return TorchCache(self._model, capacity or self.config.max_position_embeddings)

    @torch.inference_mode()
    def forward(self, tokens: NDArray[np.integer], cache: TorchCache) -> Floats:
        """Feed tokens (T,) and return their final normalised states (T, E); the cache grows by T."""
        cache.reserve(tokens, self.config.vocab_size)
        fed = torch.from_numpy(np.asarray(tokens, np.int64)).to(self._device)
        cache.held.truncate(cache.length)
        states = self._model.hidden(fed[None], cache.held, fused=self._fused())[0]
        cache.length += len(tokens)
        return _numbers(states)

    def forward_batch(self, feeds: Sequence[tuple[NDArray[np.integer], TorchCache]]) -> Floats:
        """Feed tokens (T_i,) each to its own cache; states (sum of T_i, E)."""
        return np.concatenate([self.forward(tokens, cache) for tokens, cache in feeds])

    @torch.inference_mode()
    def logits(self, states: Floats) -> Floats:
        """Logits (T, V) of final states (T, E)."""
        hidden = torch.from_numpy(states).to(self._device, self._model.head_weight.dtype)
        return _numbers(self._model.logits(hidden, self._fused()))

    @property
    def _device(self) -> torch.device:
        return self._model.head_weight.device

    def _fused(self) -> FusedWeights:
        self._model.inference_layout = fuse(self._model, reuse=self._model.inference_layout)
        return self._model.inference_layout


class TorchCache(Room):
    """Keys and values of one sequence."""

    def __init__(self, model: MobileLLM, capacity: int) -> None:
        super().__init__(model.config, capacity)
        self.held: KVCache = model.new_cache(1, capacity)


def open_checkpoint(source: str, say: Callable[[str], None]) -> RuntimeModel:
    """A model directory, a training run, or a Hub id. Raises FileNotFoundError without a tokenizer, and what
    `mobilellm.load` raises."""
    loaded = load(source, say=say)
    if loaded.tokenizer is None:
        raise FileNotFoundError(
            f"{source}: has no tokenizer.json or tokenizer.model, so it cannot read text; put one beside the "
            "weights"
        )
    return RuntimeModel(TorchModel(loaded.model), loaded.tokenizer, source, loaded.chat_template)


def _numbers(tensor: Tensor) -> Floats:
    return tensor.float().cpu().numpy()
