"""Small random models as .gguf files, and as PyTorch models of the same weights."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from pathlib import Path

from random_models import random_model

from exported_gguf import export_gguf
from mobilellm.config import ModelConfig
from mobilellm.model import checkpoint
from mobilellm.model.transformer import MobileLLM
from mobilellm.tokenizer import Tokenizer

SHAPE = ModelConfig(
    vocab_size=320, hidden_size=64, intermediate_size=160, num_layers=3, num_heads=4, num_kv_heads=2,
    head_dim=16, max_position_embeddings=96,
)  # fmt: skip


@cache
def small_tokenizer() -> Tokenizer:
    return Tokenizer.train(["some words to learn pieces from, and some more words of all kinds"] * 20, 300)


def saved(directory: Path, config: ModelConfig, seed: int = 0) -> MobileLLM:
    """A random model, saved with a tokenizer in `directory`."""
    model = random_model(config, seed)
    checkpoint.save(directory, model, small_tokenizer())
    return model


def exported(
    directory: Path, kind: str, config: ModelConfig = SHAPE, **options: object
) -> tuple[Path, MobileLLM]:
    """(file, the model it was made of)"""
    model = saved(directory / "model", config)
    file = directory / f"{kind}.gguf"
    export_gguf(directory / "model", file, kind, **options)  # type: ignore[arg-type]
    return file, model


def shared(order: str, repeats: int, **changes: object) -> ModelConfig:
    return replace(SHAPE, order=order, repeats=repeats, **changes)  # type: ignore[arg-type]
