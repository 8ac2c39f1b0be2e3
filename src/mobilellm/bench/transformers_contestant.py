"""transformers: its own model code on a saved directory, one forward pass a token, with its own cache."""

from __future__ import annotations

import time
from typing import Any

import torch
import transformers

from mobilellm.bench.torch_contestant import torch_about
from mobilellm.model_directory import read_config_file
from mobilellm.runtime.bench import fed_tokens


class TransformersContestant:
    """The weights as they are stored. Without its generate(), which would add its own time to every token."""

    def __init__(self, source: str, threads: int, room: int) -> None:
        if read_config_file(source).model_type == "mobilellm":
            raise ValueError(
                "transformers has no class for its layout; one without code of its own is written by: "
                f"mobilellm convert {source} OUT --to llama --unroll"
            )
        torch.set_num_threads(threads)
        start = time.perf_counter()
        self._model = transformers.AutoModelForCausalLM.from_pretrained(source, dtype="auto").eval()
        self.load_seconds = time.perf_counter() - start
        self._tokens = torch.from_numpy(fed_tokens(room, self._model.config.vocab_size))[None]
        self._cache = transformers.DynamicCache(config=self._model.config)

    def about(self) -> dict[str, Any]:
        config = self._model.config
        keys = config.num_key_value_heads * config.head_dim * config.num_hidden_layers * 2
        return {"version": transformers.__version__, **torch_about(self._model, keys)}

    def prefill(self, tokens: int) -> float:
        self._truncate(0)
        start = time.perf_counter()
        self._feed(0, tokens)
        return time.perf_counter() - start

    def decode(self, depth: int, tokens: int) -> float:
        self._truncate(depth)
        self._feed(self._cache.get_seq_length(), depth)
        start = time.perf_counter()
        for place in range(depth, depth + tokens):
            self._feed(place, place + 1)
        return time.perf_counter() - start

    def _truncate(self, length: int) -> None:
        if (beyond := self._cache.get_seq_length() - length) > 0:
            self._cache.crop(-beyond)

    @torch.inference_mode()
    def _feed(self, start: int, end: int) -> None:
        if start < end:
            self._model(self._tokens[:, start:end], past_key_values=self._cache, logits_to_keep=1)
