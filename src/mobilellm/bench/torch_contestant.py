"""This package's PyTorch model, run as `mobilellm generate` runs it."""

from __future__ import annotations

import time
from typing import Any

import torch

from mobilellm import __version__
from mobilellm.model import api
from mobilellm.model.fused import fuse
from mobilellm.runtime.bench import fed_tokens


class TorchContestant:
    """A model directory in the dtype it is stored in (float16 becomes float32 on a CPU)."""

    def __init__(self, source: str, threads: int, room: int) -> None:
        torch.set_num_threads(threads)
        start = time.perf_counter()
        self._model = api.load(source, say=lambda notice: None).model
        self._fused = fuse(self._model)
        self.load_seconds = time.perf_counter() - start
        self._tokens = torch.from_numpy(fed_tokens(room, self._model.config.vocab_size))[None]
        self._cache = self._model.new_cache(1, room)

    def about(self) -> dict[str, Any]:
        config = self._model.config
        numbers = 2 * config.num_kv_heads * config.head_dim * config.num_steps
        return {"version": __version__, **torch_about(self._model, numbers)}

    def prefill(self, tokens: int) -> float:
        self._cache.truncate(0)
        start = time.perf_counter()
        self._feed(0, tokens)
        return time.perf_counter() - start

    def decode(self, depth: int, tokens: int) -> float:
        self._cache.truncate(min(depth, self._cache.length))
        self._feed(self._cache.length, depth)
        start = time.perf_counter()
        for place in range(depth, depth + tokens):
            self._feed(place, place + 1)
        return time.perf_counter() - start

    @torch.inference_mode()
    def _feed(self, start: int, end: int) -> None:
        if start < end:
            hidden = self._model.hidden(self._tokens[:, start:end], self._cache, fused=self._fused)
            self._model.logits(hidden[:, -1], self._fused)


def torch_about(model: torch.nn.Module, cache_numbers: int) -> dict[str, Any]:
    """What a contestant tells of a model in torch; `cache_numbers` are kept for every token."""
    weights = {id(each): each for each in model.parameters()}.values()
    size = sum(each.nbytes for each in weights)
    kind = next(iter(weights)).dtype
    embedding: Any = model.get_parameter("model.embed_tokens.weight")
    head: Any = dict(model.named_parameters()).get("lm_head.weight", embedding)
    name = {torch.float32: "f32", torch.bfloat16: "bf16", torch.float16: "f16"}[kind]
    return {
        "backends": f"torch {torch.__version__}",
        "n_threads": torch.get_num_threads(),
        "type_k": name,
        "type_v": name,
        "model_type": f"{type(model).__name__} {name.upper()}",
        "model_size": size,
        "model_n_params": sum(each.numel() for each in weights),
        "bytes_per_token": size - (0 if head is embedding else embedding.nbytes),
        "cache_bytes_per_token": cache_numbers * kind.itemsize,
    }
