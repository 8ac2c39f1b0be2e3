"""Small random models, whole and quantised, for the tests of `quant`."""

from __future__ import annotations

from gguf_files import SHAPE, saved, shared, small_tokenizer
from random_models import random_model, some_tokens

from mobilellm.config import ModelConfig
from mobilellm.model.quantized import Quantized
from mobilellm.model.transformer import MobileLLM
from mobilellm.quant.artefact import assemble, quantized_model
from mobilellm.quant.nearest import round_to_nearest
from mobilellm.quant.schemes import Scheme, scheme

__all__ = [
    "SHAPE",
    "SPELLINGS",
    "random_model",
    "rounded",
    "saved",
    "shared",
    "small_tokenizer",
    "some_tokens",
]

SPELLINGS: dict[str, Scheme] = {
    "q8_0": scheme("q8_0"),
    "q4_0": scheme("q4_0"),
    "q4_0, embedding q8_0": scheme("q4_0", "q8_0"),
    "8da4w": scheme("8da4w"),
    "8da4w, embedding int4": scheme("8da4w", "int4"),
    "int8": scheme("int8"),
    "w8a8": scheme("w8a8"),
    "w8a8, kv": scheme("w8a8", kv=True),
    "8da4w, kv": scheme("8da4w", kv=True),
}


def rounded(
    chosen: Scheme, config: ModelConfig = SHAPE, seed: int = 0
) -> tuple[MobileLLM, Quantized, MobileLLM]:
    """(a random model, what quantising it stores, the quantised model)"""
    source = random_model(config, seed)
    stored = assemble(source, chosen, round_to_nearest(source, chosen))
    return source, stored, quantized_model(source, stored)
