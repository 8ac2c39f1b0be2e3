"""Accounting against published figures, against real models, and against torch's own FLOP counter."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from mobilellm import accounting
from mobilellm.accounting import BitWidths, bytes_by_part, executed_parameters, stored_parameters
from mobilellm.config import ORDERS, ModelConfig
from mobilellm.model.transformer import MobileLLM
from mobilellm.presets import preset, preset_names

#              tied, as published | with a head of its own | fp16 KV bytes a token
PUBLISHED = {
    "125m": (124_635_456, 143_067_456, 23_040),
    "350m": (345_355_200, 376_075_200, 40_960),
    "600m": (603_188_352, 640_052_352, 61_440),
    "1b": (1_005_461_760, 1_046_421_760, 69_120),
    "1.5b": (1_511_188_800, 1_562_388_800, 69_120),
    "ls-125m": (124_635_456, 143_067_456, 46_080),
    "ls-350m": (345_355_200, 376_075_200, 81_920),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_counts(name: str) -> None:
    tied, untied, kv_bytes = PUBLISHED[name]
    config = preset(name)
    assert stored_parameters(config).total == tied
    assert stored_parameters(replace(config, tie_word_embeddings=False)).total == untied
    assert accounting.kv_cache_bytes_per_token(config) == kv_bytes
    assert accounting.kv_cache_bytes_per_token(config, 8) == kv_bytes // 2


def count(model: MobileLLM, part: str) -> int:
    return sum(weight.numel() for name, weight in model.named_parameters() if part in name)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("name", preset_names())
def test_every_part_equals_a_real_model(name: str, tied: bool) -> None:
    config = replace(preset(name), tie_word_embeddings=tied)
    with torch.device("meta"):
        model = MobileLLM(config)
    stored = stored_parameters(config)
    assert stored.total == sum(weight.numel() for weight in model.parameters())
    assert stored.embedding == count(model, "embed_tokens")
    assert stored.head == count(model, "lm_head")
    assert stored.attention == count(model, "self_attn")
    assert stored.ffn == count(model, "mlp")
    assert stored.norms == count(model, "norm")
    assert stored.matrices == stored.total - stored.norms


def test_sharing_executes_more_than_it_stores() -> None:
    shared = preset("ls-125m")
    assert stored_parameters(shared) == stored_parameters(preset("125m"))
    assert executed_parameters(shared) == executed_parameters(shared.unrolled())
    assert executed_parameters(preset("125m")).total == 124_635_456  # tied and not shared: all of it, once
    executed, once = executed_parameters(shared), executed_parameters(preset("125m"))
    assert (executed.attention, executed.ffn) == (2 * once.attention, 2 * once.ffn)
    assert executed.head == once.head


small_configs = st.builds(
    lambda width, ffn, layers, kv, groups, repeats, order, tied: ModelConfig(
        vocab_size=50,
        hidden_size=width,
        intermediate_size=ffn,
        num_layers=layers,
        num_heads=kv * groups,
        num_kv_heads=kv,
        head_dim=8,
        max_position_embeddings=64,
        tie_word_embeddings=tied,
        repeats=repeats,
        order=order if repeats > 1 else "immediate",
    ),
    width=st.sampled_from([8, 24, 40]),
    ffn=st.sampled_from([16, 56]),
    layers=st.integers(1, 3),
    kv=st.integers(1, 2),
    groups=st.integers(1, 3),
    repeats=st.integers(1, 3),
    order=st.sampled_from(ORDERS),
    tied=st.booleans(),
)


@settings(max_examples=8, deadline=None)
@given(config=small_configs, length=st.integers(2, 24))
def test_flops_equal_what_torch_counts(config: ModelConfig, length: int) -> None:
    """torch's counter sees all T x T scores, causal or not: there each token has T keys."""
    model = MobileLLM(config)
    tokens = torch.zeros(2, length, dtype=torch.long)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        loss = model(tokens).sum()
        forward = counter.get_total_flops()
        loss.backward()
    weights = accounting.forward_flops_per_token(config, length, attention=False)
    square = accounting.attention_flops_per_token(config, length)
    assert forward == tokens.numel() * (weights + square)
    assert counter.get_total_flops() == 3 * forward
    causal = accounting.forward_flops_per_token(config, length)
    token_by_token = sum(weights + accounting.attention_flops_per_token(config, t + 1) for t in range(length))
    assert causal * length == token_by_token
    assert accounting.training_flops_per_token(config, length) == 3 * causal
    assert accounting.training_flops_per_token(config, length, attention=False) == 3 * weights


@settings(max_examples=10, deadline=None)
@given(config=small_configs)
def test_kv_bytes_equal_a_real_cache(config: ModelConfig) -> None:
    cache = MobileLLM(config).new_cache(batch=2, capacity=5)  # float32
    per_token = (cache.keys.nbytes + cache.values.nbytes) / (2 * 5)
    assert accounting.kv_cache_bytes_per_token(config, 32) == per_token


def test_gflop_per_token_as_commonly_quoted() -> None:
    """6N plus causal attention at 2,048 tokens; the published rounding."""
    quoted = {"125m": 0.96, "350m": 2.45, "600m": 4.18, "1b": 6.88, "1.5b": 10.1}
    for name, gigaflops in quoted.items():
        assert accounting.training_flops_per_token(preset(name), 2048) / 1e9 == pytest.approx(
            gigaflops, rel=4e-3
        )


def test_bytes_at_bit_widths() -> None:
    stored = stored_parameters(preset("125m"))
    fp16 = bytes_by_part(stored, BitWidths.of_matrices(16))
    assert fp16.total == 2 * 124_635_456  # the official file: 249 MB
    assert bytes_by_part(stored, BitWidths.of_matrices(32)).total == 4 * 124_635_456
    q4 = bytes_by_part(stored, BitWidths.of_matrices(4.5, embedding=8.5))
    assert (q4.ffn, q4.embedding, q4.head) == (stored.ffn * 9 // 16, stored.embedding * 17 // 16, 0)
    assert q4.norms == 2 * stored.norms  # norms are not shrunk
    one_byte_short = bytes_by_part(accounting.Parameters(3, 0, 1, 0, 0), BitWidths(4, 4, 16))
    assert (one_byte_short.embedding, one_byte_short.attention) == (2, 1)  # whole bytes, rounded up


def test_mfu_and_days_of_a_known_run() -> None:
    """1T tokens of 125M in 3 days on 32 A100: 120.6k tokens/s each, MFU 29 % by 6N, 37 % with attention."""
    config = preset("125m")
    speed = 1e12 / (3 * 86_400 * 32)
    assert round(speed, -2) == 120_600
    flops = accounting.training_flops_per_token(config, 2048)
    sixn = accounting.training_flops_per_token(config, 2048, attention=False)
    assert round(accounting.mfu(sixn, speed, 312e12), 2) == 0.29
    assert round(accounting.mfu(flops, speed, 312e12), 2) == 0.37
    assert accounting.days_to_train(1e12, 32, speed) == pytest.approx(3)
    again = accounting.tokens_per_second(flops, 312e12, accounting.mfu(flops, speed, 312e12))
    assert again == pytest.approx(speed)


@pytest.mark.parametrize("bits", [0, -4, 0.5, 33, math.nan, math.inf])
def test_bad_bits(bits: float) -> None:
    for call in (
        lambda: BitWidths.of_matrices(bits),
        lambda: BitWidths.of_matrices(8, embedding=bits),
        lambda: accounting.kv_cache_bytes_per_token(preset("test"), bits),
    ):
        with pytest.raises(ValueError, match=r"^bits of .* must be between 1 and 32"):
            call()


def test_bad_numbers() -> None:
    config = preset("test")
    with pytest.raises(ValueError, match="context = 0"):
        accounting.forward_flops_per_token(config, 0)
    for utilisation in (0, -0.1, 1.01, math.nan):
        with pytest.raises(ValueError, match="mfu = "):
            accounting.tokens_per_second(1e9, 1e12, utilisation)
    with pytest.raises(ValueError, match="peak_flops = 0"):
        accounting.mfu(1e9, 1e3, 0)
    with pytest.raises(ValueError, match="devices = 0"):
        accounting.days_to_train(1e12, 0, 1e3)
    with pytest.raises(ValueError, match="tokens = inf"):
        accounting.days_to_train(math.inf, 1, 1e3)
