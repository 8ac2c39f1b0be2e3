"""What a teacher takes, against torch's own count of operations and the bytes that it holds."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from tiny_runs import LS, ORDINARY
from torch.utils.flop_counter import FlopCounterMode

from mobilellm.config import ModelConfig
from mobilellm.model.transformer import MobileLLM
from mobilellm.train.teacher_cost import (
    CHUNK_LOGITS,
    TOKENS_AT_ONCE,
    Lack,
    all_of,
    inference_bytes,
    shape_of,
)

SHAPES = [ORDINARY, LS, replace(ORDINARY, tie_word_embeddings=False)]


@pytest.mark.parametrize("config", SHAPES)
def test_flops_are_those_that_torch_counts(config: ModelConfig) -> None:
    """Of three passages asked at all places; torch counts attention to the tokens after one as well."""
    B, T = 3, 17
    with torch.device("meta"):
        model, tokens = MobileLLM(config), torch.zeros(B, T, dtype=torch.long)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(tokens)
    counts = {operator.__name__: count for operator, count in counter.get_flop_counts()["Global"].items()}
    attention = sum(count for name, count in counts.items() if "attention" in name or "bmm" in name)
    assert attention > 0
    expected = counter.get_total_flops() - attention + attention * (T + 1) / (2 * T)
    shape = shape_of("mine", config, config.vocab_size, 0)
    assert shape.flops(Lack(B, B * T, B * T, B * T * (T + 1) // 2, T)) == pytest.approx(expected)
    assert shape.flops(all_of(1, B, T)) == pytest.approx(expected)
    fewer = shape.flops(Lack(B, B * T, 5, B * T * (T + 1) // 2, T))
    assert fewer == pytest.approx(expected - 2 * (B * T - 5) * config.vocab_size * config.hidden_size)


@pytest.mark.parametrize("config", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bytes_are_those_of_the_weights_and_what_is_joined(config: ModelConfig, dtype: torch.dtype) -> None:
    model = MobileLLM(config).to(dtype)
    weights = sum(parameter.numel() for parameter in model.parameters())
    joined = 0
    for block in model.model.layers:
        names = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.gate_proj", "mlp.up_proj")
        joined += sum(block.get_parameter(f"{name}.weight").numel() for name in names)
    assert inference_bytes(config, dtype.itemsize) == dtype.itemsize * (weights + joined)


def test_memory_beside_the_student() -> None:
    shape = shape_of("mine", ORDINARY, ORDINARY.vocab_size, 1000)
    short, long = (
        shape.memory_bytes(length, 4, on_gpu=False) for length in (10, TOKENS_AT_ONCE["cpu"] + 100)
    )
    a_token = 4 * ORDINARY.hidden_size + 4 * (5 * ORDINARY.hidden_size + 3 * ORDINARY.intermediate_size)
    assert short == 1000 + 16 * CHUNK_LOGITS + TOKENS_AT_ONCE["cpu"] * a_token
    assert long - short == 100 * a_token
    beside = replace(shape, runs_beside=True)  # a .gguf file runs on the CPU
    assert beside.memory_bytes(10, 4, on_gpu=True) == 0
    assert beside.memory_bytes(10, 4, on_gpu=False) == short
